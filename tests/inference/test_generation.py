"""Generation: the transformers backend on a tiny model, vLLM's on a fake, the server's against a faulty server."""

import importlib.util
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass, field, fields
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, tiny_model
from support.openai_server import FATAL_FAULTS, TRANSPORT_FAULTS, Fault, OpenAIServer, Reply, openai_server_fixture  # noqa: F401 - a fixture

from rgsd.errors import ConfigError, ModelError, PromptTooLong
from rgsd.inference import (
    Response,
    SamplingConfig,
    ServerGenerator,
    TransformersGenerator,
    VllmGenerator,
    generate,
    prompt_seed,
)
from rgsd.inference.chat import RetryPolicy
from rgsd.inference.replies import MAX_REPLY_BYTES, parse_retry_after
from rgsd.inference.transformers_backend import _SeededSampling
from rgsd.models.kernels.sampling import Sampling
from rgsd.prompts.thinking import strip_thinking


def asked(text):
    return [{"role": "user", "content": text}]


PROMPTS = [asked("water " * n + "?") for n in (9, 1, 5, 3, 12, 2, 7, 4)]


@pytest.fixture(autouse=True)
def one_thread(request):
    """Use one thread: more make a tiny model no faster, and far slower on a busy machine."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Kept:
    """A caller's `done`: records its arguments, their order and the thread."""

    def __init__(self):
        self.found, self.order, self.threads = {}, [], set()

    def __call__(self, i, response):
        assert i not in self.found
        self.found[i] = response
        self.order.append(i)
        self.threads.add(threading.current_thread())


# Transformers.


def test_a_greedy_response_does_not_depend_on_its_batch(tokenizer):
    model = tiny_model(tokenizer)
    one, many = (
        TransformersGenerator(model, tokenizer, SamplingConfig(12), batch_size=n).generate(PROMPTS) for n in (1, 8)
    )
    assert one == many
    assert len({r.text for r in one}) > 4
    ids = tokenizer.apply_chat_template(PROMPTS[2], add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        for _ in range(5):
            ids = [*ids, model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
    assert many[2].text.startswith(tokenizer.decode(ids[-5:], skip_special_tokens=True))


def test_responses_are_handed_over_batch_by_batch_and_the_rest_can_be_asked_for_later(tokenizer):
    model = tiny_model(tokenizer)
    generator = TransformersGenerator(model, tokenizer, SamplingConfig(8), batch_size=3)
    kept = Kept()
    whole = generator.generate(PROMPTS, kept)
    assert [kept.found[i] for i in range(8)] == whole
    assert kept.threads == {threading.current_thread()}

    first: dict[int, Response] = {}

    def killed_after_a_batch(i, response):
        if len(first) == 3:
            raise KeyboardInterrupt
        first[i] = response

    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS, killed_after_a_batch)
    assert len(first) == 3
    missing = [i for i in range(8) if i not in first]
    rest = dict(zip(missing, generator.generate([PROMPTS[i] for i in missing]), strict=True))
    assert [{**first, **rest}[i] for i in range(8)] == whole


def test_the_checkpoints_sampling_settings_stay_out(tokenizer):
    plain, odd = tiny_model(tokenizer), tiny_model(tokenizer)
    leaky = {
        "do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 4.0, "no_repeat_ngram_size": 2,
        "min_new_tokens": 30, "suppress_tokens": list(range(60, 200)), "num_beams": 2, "max_length": 5,
    }  # fmt: skip
    for name, value in leaky.items():
        setattr(odd.generation_config, name, value)
    wanted = TransformersGenerator(plain, tokenizer, SamplingConfig(16)).generate(PROMPTS)
    assert TransformersGenerator(odd, tokenizer, SamplingConfig(16)).generate(PROMPTS) == wanted
    assert {k: getattr(odd.generation_config, k) for k in leaky} == leaky

    with pytest.raises(RuntimeError, match="stop"):
        TransformersGenerator(odd, tokenizer, SamplingConfig(4)).generate(PROMPTS, failing)
    assert odd.generation_config.repetition_penalty == 4.0


def failing(i, response):
    raise RuntimeError("stop")


def test_an_adapters_wrapper_is_generated_from_as_well(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(tokenizer)
    wanted = generate(model, tokenizer, PROMPTS, SamplingConfig(8))
    model.generation_config.repetition_penalty = 4.0
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert generate(wrapped, tokenizer, PROMPTS, SamplingConfig(8)) == wanted  # a fresh adapter changes nothing
    assert model.generation_config.repetition_penalty == 4.0


def test_the_checkpoints_ends_of_sequence_are_kept(tokenizer):
    model = tiny_model(tokenizer)
    long = TransformersGenerator(model, tokenizer, SamplingConfig(12)).generate(PROMPTS[:1])[0]
    assert (long.n_tokens, long.is_truncated) == (12, True)
    ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_dict=False)
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, out[5]]
    short = TransformersGenerator(model, tokenizer, SamplingConfig(12)).generate(PROMPTS[:1])[0]
    assert short == Response(tokenizer.decode(out[: out.index(out[5])]), out.index(out[5]), False)


def test_the_model_is_left_in_its_mode(tokenizer, model):
    for mode in (True, False):
        model.train(mode)
        generate(model, tokenizer, PROMPTS[:2], SamplingConfig(2))
        assert model.training is mode
    assert generate(model, tokenizer, [], SamplingConfig(2)) == []


def test_a_sampled_response_depends_on_seed_and_prompt_alone(tokenizer):
    model = tiny_model(tokenizer)

    def sampled(prompts, batch_size=8, seed=0, **settings):
        settings = {"temperature": 0.8, "top_p": 0.9, **settings}
        generator = TransformersGenerator(
            model, tokenizer, SamplingConfig(12, seed=seed, **settings), batch_size=batch_size
        )
        return generator.generate(prompts)

    whole = sampled(PROMPTS)
    assert sampled(PROMPTS, batch_size=1) == whole
    assert sampled(PROMPTS[5:2:-1]) == whole[5:2:-1]
    assert sampled(PROMPTS, seed=1) != whole
    greedy = TransformersGenerator(model, tokenizer, SamplingConfig(12)).generate(PROMPTS)
    assert greedy != whole
    assert sampled(PROMPTS, temperature=1e-4) == greedy
    assert sampled(PROMPTS, temperature=5.0, top_p=1e-6) == greedy
    assert prompt_seed(0, PROMPTS[0]) != prompt_seed(1, PROMPTS[0]) != prompt_seed(1, PROMPTS[1])
    assert 0 <= prompt_seed(0, PROMPTS[0]) < 2**31


@pytest.mark.parametrize("fast", [True, False])
def test_filters_that_leave_one_token_sample_greedily(tokenizer, monkeypatch, fast):
    monkeypatch.setenv("RGSD_FAST", str(int(fast)))
    model = tiny_model(tokenizer)

    def sampled(**settings):
        return TransformersGenerator(model, tokenizer, SamplingConfig(12, **settings)).generate(PROMPTS)

    greedy = sampled()
    assert sampled(temperature=1.0) != greedy
    assert sampled(temperature=1.0, top_k=1) == greedy
    assert sampled(temperature=1.0, min_p=0.999) == greedy
    assert sampled(repetition_penalty=4.0) != greedy


def test_sampling_follows_the_probabilities():
    n, logits_V = 20000, torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    draws_BT = torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids_BT, scores_BV = torch.zeros(n, 3, dtype=torch.long), logits_V.expand(n, -1)

    def shares(temperature, top_p):
        out_BV = _SeededSampling(draws_BT, 3, Sampling(temperature, top_p))(ids_BT, scores_BV)
        assert (out_BV > -torch.inf).sum(-1).eq(1).all()
        return out_BV.argmax(-1).bincount(minlength=5) / n

    assert torch.allclose(shares(1.0, 1.0), logits_V.softmax(-1), atol=0.015)
    assert torch.allclose(shares(2.0, 1.0), (logits_V / 2).softmax(-1), atol=0.015)
    # 0.64 and 0.24 together are the first to reach 0.8.
    assert torch.allclose(shares(1.0, 0.8), torch.tensor([0, 0.2689, 0, 0.7311, 0]), atol=0.015)
    edge = _SeededSampling(torch.tensor([[1 - 1e-12], [0.0]], dtype=torch.float64), 3, Sampling())
    assert edge(ids_BT[:2], scores_BV[:2]).argmax(-1).tolist() == [3, 0]


def test_out_of_memory_halves_the_batch(tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("RGSD_FAST", "0")
    model = tiny_model(tokenizer)
    wanted = TransformersGenerator(model, tokenizer, SamplingConfig(6)).generate(PROMPTS)
    real, sizes = model.generate, []

    def small_device(room):
        def limited(input_ids, **kwargs):
            sizes.append(len(input_ids))
            if len(input_ids) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return real(input_ids=input_ids, **kwargs)

        return limited

    model.generate = small_device(2)
    generator = TransformersGenerator(model, tokenizer, SamplingConfig(6), batch_size=8)
    assert generator.generate(PROMPTS) == wanted
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert "out of memory with 8 prompts at once: continuing with 4" in capsys.readouterr().out
    model.generate = small_device(0)
    with pytest.raises(
        ModelError, match=r"runs out of memory for prompt 2 of 8 .*Tried to allocate.*lower max_new_toke"
    ):
        generator.generate(PROMPTS)


def test_a_prompt_too_long_is_refused_before_anything_is_generated(tokenizer):
    model = tiny_model(tokenizer)
    prompts = [PROMPTS[0], asked("rest " * 100), asked("drink " * 110)]
    n = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)) for p in prompts]
    kept = Kept()
    with pytest.raises(PromptTooLong) as caught:
        TransformersGenerator(model, tokenizer, SamplingConfig(1024 - n[1] + 1)).generate(prompts, kept)
    for part in (
        "prompt 3 of 3 ('drink drink",
        f"{n[2]:,} tokens",
        "holds 1,024",
        "1 more",
        f"at most {1024 - n[2]:,}",
    ):
        assert part in str(caught.value)
    assert not kept.found
    fits = TransformersGenerator(model, tokenizer, SamplingConfig(1024 - n[2]))
    assert len(fits.generate(prompts[:1])) == 1
    with pytest.raises(PromptTooLong, match="longer context"):
        TransformersGenerator(model, tokenizer, SamplingConfig(1)).generate([asked("rest " * 2000)])


def test_tags_of_reasoning_stay_in_the_text_where_they_are_special_tokens(tokenizer, model):
    from copy import deepcopy

    special = deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    think, end = special.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    row = [think, *special.encode("rest"), end, *special.encode("Walk."), special.eos_token_id, 0]
    tagged = TransformersGenerator(model, special, SamplingConfig(9, think_tags=("[THINK]", "[/THINK]")))
    assert tagged._response(row, [0]).text == "[THINK]rest[/THINK]Walk."
    assert TransformersGenerator(model, special, SamplingConfig(9))._response(row, [0]).text == "restWalk."


def test_a_prompt_that_opens_the_reasoning_is_noted(tokenizer, model):
    from copy import deepcopy

    opening = deepcopy(tokenizer)
    opening.chat_template = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n{{ '' if quick else '<think>\n' }}{%")
    assert generate(model, opening, PROMPTS[:1], SamplingConfig(2))[0].starts_in_thinking
    quick = generate(model, opening, PROMPTS[:1], SamplingConfig(2, chat_template_kwargs={"quick": True}))
    assert not quick[0].starts_in_thinking


def test_a_template_that_refuses_is_an_error_with_a_remedy(tokenizer, model):
    from copy import deepcopy

    strict = deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ModelError, match=r"refuses prompt 1 of 1 .*no system role"):
        generate(model, strict, PROMPTS[:1], SamplingConfig(2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"batch_size": 0},
    ],
)
def test_settings_out_of_range_are_refused(tokenizer, model, wrong):
    batch_size = wrong.get("batch_size", 8)
    sampling = {"max_new_tokens": 4, **{k: v for k, v in wrong.items() if k != "batch_size"}}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TransformersGenerator(model, tokenizer, SamplingConfig(**sampling), batch_size=batch_size)


# vLLM, by a stand-in with the interface of vllm.LLM, vllm.SamplingParams and vllm.RequestOutput (0.22 to 0.31).


@dataclass
class FakeSamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    detokenize: bool = True
    repetition_penalty: float = 1.0


@dataclass
class FakeCompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass
class FakeRequestOutput:
    prompt_token_ids: list[int]
    outputs: list[FakeCompletionOutput]
    finished: bool = True


@dataclass
class FakeVllm:
    """A fake `vllm` module whose LLM is the tiny model, decoded greedily prompt by prompt."""

    tokenizer: Any
    model: Any
    calls: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    load_error: Exception | None = None

    def module(self):
        fake = self

        class LLM:
            def __init__(self, model, *, dtype="auto", seed=0, revision=None, **kwargs):
                if fake.load_error:
                    raise fake.load_error
                fake.options = {"model": model, "dtype": dtype, "seed": seed, "revision": revision, **kwargs}
                config = types.SimpleNamespace(max_model_len=kwargs.get("max_model_len", 1024))
                self.llm_engine = types.SimpleNamespace(model_config=config)

            def get_tokenizer(self):
                return fake.tokenizer

            def chat(
                self, messages, sampling_params=None, use_tqdm=True, lora_request=None, chat_template=None,
                chat_template_content_format="auto", add_generation_prompt=True, continue_final_message=False,
                tools=None, chat_template_kwargs=None, tokenization_kwargs=None, mm_processor_kwargs=None,
            ):  # fmt: skip
                assert isinstance(sampling_params, list)
                fake.calls.append(sampling_params)
                pairs = zip(messages, sampling_params, strict=True)
                return [fake.answer(m, p, chat_template_kwargs or {}) for m, p in pairs]

        return types.SimpleNamespace(LLM=LLM, SamplingParams=FakeSamplingParams)

    def answer(self, messages, params, template_kwargs):
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **template_kwargs
        )
        out = self.model.generate(torch.tensor([ids]), max_new_tokens=params.max_tokens, do_sample=False)
        new = out[0, len(ids) :].tolist()  # as vLLM's, with the end of sequence
        ends = self.model.generation_config.eos_token_id
        is_ended = new[-1] in (ends if isinstance(ends, list) else [ends])
        reason = self.finish_reason or ("stop" if is_ended else "length")
        text = self.tokenizer.decode(new, skip_special_tokens=True) if params.detokenize else ""
        return FakeRequestOutput(ids, [FakeCompletionOutput(0, text, new, reason)])


@pytest.fixture
def fake_vllm(tokenizer, model, monkeypatch):
    fake = FakeVllm(tokenizer, model)
    monkeypatch.setitem(sys.modules, "vllm", fake.module())
    return fake


def test_vllm_gives_what_transformers_gives(fake_vllm, tokenizer, model):
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in PROMPTS]
    rows = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist() for p in ids]
    # Some responses end: with a token that not all of them hold.
    end = next(t for row in rows for t in row if any(t not in other for other in rows))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    wanted = TransformersGenerator(model, tokenizer, SamplingConfig(12)).generate(PROMPTS)
    assert {r.is_truncated for r in wanted} == {True, False}
    kept = Kept()
    generator = VllmGenerator(
        "owner/name", SamplingConfig(12), batch_size=3, revision="v1", engine={"tensor_parallel_size": 2}
    )
    assert generator.generate(PROMPTS, kept) == wanted
    assert kept.found == dict(enumerate(wanted))
    assert [len(c) for c in fake_vllm.calls] == [3, 3, 2]
    params = fake_vllm.calls[0][0]
    assert (params.temperature, params.top_p, params.max_tokens, params.repetition_penalty) == (0.0, 1.0, 12, 1.0)
    assert fake_vllm.options == {
        "model": "owner/name", "dtype": "auto", "seed": 0, "revision": "v1", "tensor_parallel_size": 2,
    }  # fmt: skip
    assert generator.name == "vllm:owner/name"


def test_vllm_is_seeded_by_prompt(fake_vllm, tmp_path):
    VllmGenerator(str(tmp_path), SamplingConfig(4, temperature=0.7, seed=3), revision="main").generate(PROMPTS)
    assert [p.seed for p in fake_vllm.calls[0]] == [prompt_seed(3, p) for p in PROMPTS]
    assert fake_vllm.options["revision"] is None  # a folder has none


def test_vllms_failures_are_explained(fake_vllm):
    with pytest.raises(PromptTooLong, match="prompt 5 of 8"):
        VllmGenerator("m", SamplingConfig(10), engine={"max_model_len": 30}).generate(PROMPTS)
    fake_vllm.finish_reason = "abort"
    with pytest.raises(ModelError, match=r"prompt 1 of 8 .* with 'abort'"):
        VllmGenerator("m", SamplingConfig(4)).generate(PROMPTS)
    fake_vllm.load_error = RuntimeError("Engine core initialization failed.\nSee root cause above.")
    with pytest.raises(ModelError, match="vLLM cannot load 'm': Engine core initialization failed"):
        VllmGenerator("m", SamplingConfig(4))


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'rgsd\[vllm\]'"):
        VllmGenerator("m", SamplingConfig(4))


# Servers.


def question(request):
    return request["messages"][-1]["content"]


def echo(request):
    return f"answer to {question(request)}"


QUESTIONS = [asked(f"question {i}") for i in range(8)]


def client(server, **settings):
    names = {f.name for f in fields(SamplingConfig)}
    sampling = SamplingConfig(**{"max_new_tokens": 32, **{k: v for k, v in settings.items() if k in names}})
    of_retries = {"first_wait", "max_wait", "retries", "give_up_after"}
    retry = {"first_wait": 0.002, "max_wait": 0.02, **{k: v for k, v in settings.items() if k in of_retries}}
    rest = {k: v for k, v in settings.items() if k not in names | of_retries}
    api_base = server if isinstance(server, str) else server.url
    return ServerGenerator(
        "test-model", sampling, api_base=api_base, retry=RetryPolicy(**retry), **{"timeout": 10.0, **rest}
    )


def texts(responses):
    return [r.text for r in responses]


def test_a_greedy_request_is_openais(openai_server, monkeypatch):
    monkeypatch.setenv("RGSD_API_KEY", " secret-key\n")
    server = openai_server(echo, api_key="secret-key")
    generator = client(server)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ünïcode?"}]
    assert generator.generate([messages]) == [Response("answer to Ünïcode?", 3, False)]
    assert server.records()[0].body == {
        "model": "test-model", "messages": messages, "max_tokens": 32, "temperature": 0.0, "seed": 0,
    }  # fmt: skip
    assert generator.name == "server:test-model"
    assert generator.generate([]) == []


def test_a_sampled_request_is_seeded_by_its_prompt(openai_server):
    server = openai_server(echo)
    client(server, temperature=0.7, top_p=0.9, seed=5, concurrency=1).generate(QUESTIONS[:2])
    bodies = [r.body for r in server.records()]
    assert [b["seed"] for b in bodies] == [prompt_seed(5, q) for q in QUESTIONS[:2]]
    assert [(b["temperature"], b["top_p"]) for b in bodies] == [(0.7, 0.9)] * 2


def test_what_a_server_does_not_take_can_be_left_out_and_more_be_added(openai_server):
    server = openai_server(echo)
    more = {"chat_template_kwargs": {"enable_thinking": False}, "extra_body": {"top_k": 1, "max_tokens": 7}}
    client(server, temperature=None, seed=None, **more).generate(QUESTIONS[:1])
    body = server.records()[0].body
    assert not {"temperature", "seed"} & body.keys()
    assert (body["chat_template_kwargs"], body["top_k"], body["max_tokens"]) == ({"enable_thinking": False}, 1, 7)


@pytest.mark.parametrize(
    ("owner", "sent"),
    [
        ("vllm", {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0}),
        ("llamacpp", {"repeat_penalty": 1.0, "top_k": 0, "min_p": 0.0}),
        ("openai", {}),
    ],
)
def test_servers_that_are_known_are_told_to_leave_out_their_sampling_defaults(openai_server, owner, sent):
    server = openai_server(echo, owned_by=owner)
    client(server).generate(QUESTIONS[:1])
    body = server.records()[0].body
    assert {k: v for k, v in body.items() if "penalty" in k or k in ("top_k", "min_p")} == sent


def test_responses_are_handed_over_as_they_come_and_returned_in_order(openai_server):
    server = openai_server(
        echo, script=lambda i, body: Fault("slow", delay=0.3) if question(body).endswith("0") else None
    )
    kept = Kept()
    found = client(server).generate(QUESTIONS, kept)
    assert texts(found) == [f"answer to question {i}" for i in range(8)]
    assert kept.order[-1] == 0
    assert [kept.found[i] for i in range(8)] == found
    assert kept.threads == {threading.current_thread()}


def test_concurrency_is_bounded(openai_server):
    server = openai_server(echo, latency=0.02)
    client(server, concurrency=3).generate([asked(str(i)) for i in range(15)])
    assert server.max_concurrency == 3


@pytest.mark.parametrize("fault", [*TRANSPORT_FAULTS, "hang"])
def test_a_passing_fault_is_tried_again(openai_server, fault):
    server = openai_server(echo, script=[None, fault, None, None])
    generator = client(server, concurrency=1, timeout=0.3 if fault == "hang" else 10.0)
    assert texts(generator.generate(QUESTIONS[:3])) == [f"answer to question {i}" for i in range(3)]
    assert server.faults() == [None, fault, None] + [None] * (fault != "slow")
    assert not server.bought_twice()


def test_at_a_third_of_faults_nothing_is_lost_and_nothing_bought_twice(openai_server):
    server = openai_server(echo, fault_rate=0.3, seed=1, slow_delay=0.01, retry_after=0.01, most_in_a_row=5)
    prompts = [asked(f"number {i}") for i in range(400)]
    kept = Kept()
    found = client(server, concurrency=24).generate(prompts, kept)
    assert texts(found) == [f"answer to number {i}" for i in range(400)]
    assert len(kept.found) == 400
    assert set(server.good_replies().values()) == {1}
    assert len(server.good_replies()) == 400
    assert 0.22 < sum(f is not None for f in server.faults()) / len(server.faults()) < 0.38
    assert {f for f in server.faults() if f} == set(TRANSPORT_FAULTS)
    assert server.max_concurrency <= 24


def test_retry_after_is_honoured_by_all_requests(openai_server):
    server = openai_server(echo, script=[Fault("429", retry_after=0.4)])
    client(server, concurrency=1).generate(QUESTIONS[:2])
    first, again, last = server.records()
    assert again.at - first.at >= 0.4
    assert last.at >= again.at

    server = openai_server(echo, script=[None, None, Fault("503", retry_after=0.4)], latency=0.02)
    client(server, concurrency=2).generate(QUESTIONS)
    refused = server.records()[2]
    assert refused.ended is not None
    later = [r.at - refused.ended for r in server.records() if r.at > refused.ended + 0.01]
    assert later
    assert min(later) >= 0.38


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert parse_retry_after("1.5") == 1.5
    assert parse_retry_after("-3") == 0.0
    assert parse_retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert parse_retry_after("soon") is None
    assert parse_retry_after(None) is None


def test_a_reply_without_an_end_is_not_read_to_its_end(openai_server):
    sizes = {"question 0": MAX_REPLY_BYTES + 1, "question 1": 10}
    server = openai_server(lambda request: "x" * sizes[question(request)])
    kept = Kept()
    with pytest.raises(ModelError, match="8 MiB"):
        client(server, concurrency=1).generate([QUESTIONS[1], QUESTIONS[0]], kept)
    assert list(kept.found) == [0]


def test_a_retry_after_beyond_the_limit_ends_the_call(openai_server):
    server = openai_server(echo, script=[None, Fault("429", retry_after=3600)])
    kept = Kept()
    with pytest.raises(ModelError, match="3,600 s"):
        client(server, concurrency=1).generate(QUESTIONS, kept)
    assert texts(kept.found.values()) == ["answer to question 0"]
    assert len(server.records()) == 2


REMEDIES = {
    "401": r"refused prompt 3 of 8 \('question 2'\): status 401 .*RGSD_API_KEY is not set",
    "403": "status 403 .*set RGSD_API_KEY to a key for 'test-model'",
    "404": r"status 404.*'test-model'.*the server has test-model.*/v1",
    "400": r"status 400 \(Invalid request",
    "422": "status 422 .Unexpected fields.*extra_body",
    "quota": "no credit left. Add some",
    "redirect": "Set api_base to the address that it names",
}


@pytest.mark.parametrize("fault", FATAL_FAULTS)
def test_what_no_other_try_saves_ends_it_at_once(openai_server, monkeypatch, fault):
    monkeypatch.delenv("RGSD_API_KEY", raising=False)
    server = openai_server(echo, script=[None, None, fault])
    kept = Kept()
    with pytest.raises(ModelError, match=REMEDIES[fault]):
        client(server, concurrency=1).generate(QUESTIONS, kept)
    assert sorted(kept.found) == [0, 1]
    assert len(server.records()) == 3


def test_requests_in_flight_are_waited_for_when_another_ends_it(openai_server):
    server = openai_server(
        echo,
        script=lambda i, body: {"0": Fault("slow", delay=0.3), "1": Fault("400", delay=0.1)}.get(question(body)[-1]),
    )
    kept = Kept()
    with pytest.raises(ModelError, match="status 400"):
        client(server, concurrency=2).generate([QUESTIONS[0], QUESTIONS[1]], kept)
    assert sorted(kept.found) == [0]


def test_a_key_is_in_no_message(openai_server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "very-secret")
    server = openai_server(echo, api_key="another")  # its refusal repeats the key that it got
    with pytest.raises(ModelError) as caught:
        client(server, api_key_env="MY_KEY").generate(QUESTIONS)
    assert "the key in MY_KEY" in str(caught.value)
    assert "very-secret" not in f"{caught.value} {caught.value!r} {client(server, api_key_env='MY_KEY')!r}"
    address = server.url.replace("http://", "http://user:very-secret@") + "?key=very-secret"
    with pytest.raises(ModelError) as caught:
        client(address).generate(QUESTIONS)
    assert "very-secret" not in str(caught.value)
    assert f"at {server.url} refused" in str(caught.value)


def test_a_key_that_is_wanted_must_be_there(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY, which is not set"):
        client("http://localhost:1/v1", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "first secret\nsecond")
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        client("http://localhost:1/v1", api_key_env="MY_KEY")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["localhost:8000/v1", "", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="api_base"):
        client(address)


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_an_address_may_be_written_in_several_ways(openai_server, end):
    server = openai_server(echo)
    assert texts(client(server.url + end).generate(QUESTIONS[:1])) == ["answer to question 0"]


def test_a_prompt_without_response_does_not_keep_the_others_from_theirs(openai_server):
    server = openai_server(echo, script=lambda i, body: "500" if question(body).endswith("3") else None)
    kept = Kept()
    with pytest.raises(
        ModelError, match=r"1 of 8 prompts got no response .* 3 tries each; prompt 4 of 8 \('question 3'"
    ):
        client(server, retries=2).generate(QUESTIONS, kept)
    assert sorted(kept.found) == [0, 1, 2, 4, 5, 6, 7]
    assert server.faults().count("500") == 3


def test_a_server_that_is_down_is_given_up(openai_server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"failed 4 prompts in a row, 2 tries each, last with: no connection"):
        client(address, retries=1, give_up_after=4, concurrency=2).generate([asked(str(i)) for i in range(1000)])
    assert time.monotonic() - start < 5


def test_a_reply_without_token_counts_is_no_reply(openai_server):
    server = openai_server(echo, script=lambda i, body: "no_usage")
    with pytest.raises(ModelError, match="not a chat completion with token counts"):
        client(server, retries=1).generate(QUESTIONS[:1])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_the_server_splits_off_is_put_back(openai_server, name):
    replies = {
        "question 0": Reply("Walk.", "hm", reasoning_field=name, completion_tokens=9),
        "question 1": Reply(None, "hm, so", reasoning_field=name, finish_reason="length"),
        "question 2": Reply("Wa", "hm", reasoning_field=name, finish_reason="length"),
    }
    server = openai_server(lambda request: replies[question(request)])
    found = client(server, think_tags=("<t>", "</t>")).generate(QUESTIONS[:3])
    assert found[0] == Response("<t>hm</t>Walk.", 9, False)
    assert texts(found) == ["<t>hm</t>Walk.", "<t>hm, so", "<t>hm</t>Wa"]
    assert [strip_thinking(r.text, "<t>", "</t>") for r in found] == ["Walk.", "", "Wa"]


def test_how_a_response_ended(openai_server):
    replies = {
        "question 0": Reply("cut", finish_reason="length"),
        "question 1": Reply("filtered", finish_reason="content_filter"),
        "question 2": Reply(None, refusal="I won't."),
        "question 3": Reply(""),
    }
    server = openai_server(lambda request: replies[question(request)])
    found = client(server).generate(QUESTIONS[:4])
    assert [(r.text, r.is_truncated) for r in found] == [
        ("cut", True),
        ("filtered", True),
        ("I won't.", False),
        ("", False),
    ]
    tries = iter([Reply("half", finish_reason="abort"), Reply("whole")])
    assert texts(client(openai_server(lambda request: next(tries))).generate(QUESTIONS[:1])) == ["whole"]


def test_reasoning_that_the_prompt_opened(openai_server, capsys):
    replies = {"question 0": Reply("hm</think>Walk."), "question 1": Reply("hm, so", finish_reason="length")}
    server = openai_server(lambda request: replies[question(request)])
    client(server).generate(QUESTIONS[:2])
    assert "1 responses were cut off before they closed it" in capsys.readouterr().out
    found = client(server, prompt_opens_thinking=True).generate(QUESTIONS[:2])
    assert [strip_thinking(r.text, starts_in_thinking=r.starts_in_thinking) for r in found] == ["Walk.", ""]
    assert not capsys.readouterr().out


def test_a_model_that_wants_max_completion_tokens_gets_it(openai_server):
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    refuse = {"script": lambda i, body: Fault("400", text=said) if "max_tokens" in body else None}
    server = openai_server(echo, **refuse)
    assert len(client(server, concurrency=1).generate(QUESTIONS[:3])) == 3
    assert [r.body.get("max_completion_tokens") for r in server.records()] == [None, 32, 32, 32]
    assert len(client(openai_server(echo, latency=0.02, **refuse), concurrency=4).generate(QUESTIONS)) == 8


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
        "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
    ],
)
def test_a_prompt_beyond_the_servers_context_is_refused_by_its_name(openai_server, said):
    server = openai_server(echo, script=[Fault("400", text=said)])
    with pytest.raises(PromptTooLong, match=r"prompt 1 of 8 .*4096.*Lower max_new_tokens"):
        client(server, concurrency=1).generate(QUESTIONS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_ends_it_at_once(openai_server, error):
    server = openai_server(echo, script=lambda i, body: None if question(body).endswith("0") else "hang")
    kept: dict[int, Response] = {}

    def interrupted(i, response):
        kept[i] = response
        raise error

    before = set(threading.enumerate())
    start = time.monotonic()
    with pytest.raises(error):
        client(server, timeout=60.0).generate(QUESTIONS, interrupted)
    assert time.monotonic() - start < 3
    assert list(kept) == [0]
    assert not [t for t in threading.enumerate() if t.name == "rgsd-chat" and t not in before]


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}, {"give_up_after": 0}, {"temperature": -0.1}]
)
def test_settings_of_a_server_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        client("http://localhost:1/v1", **wrong)


def test_closing_the_faulty_server_ends_what_hangs():
    ended = []

    def asking(generator):
        with pytest.raises(ModelError, match="8 of 8 prompts got no response"):
            generator.generate(QUESTIONS)
        ended.append(time.monotonic())

    with OpenAIServer(echo, script=lambda i, body: "hang") as server:
        thread = threading.Thread(target=asking, args=(client(server, retries=0, timeout=30.0),))
        thread.start()
        while len(server.records()) < 8:
            time.sleep(0.01)
        closed = time.monotonic()
    thread.join()
    assert ended[0] - closed < 2


def test_an_error_of_the_tests_own_answer_is_raised(openai_server):
    server = OpenAIServer(lambda request: 1 / 0).start()
    with pytest.raises(ModelError, match="the test's answer failed"):
        client(server, retries=0).generate(QUESTIONS[:1])
    with pytest.raises(ZeroDivisionError):
        server.close()


# A real server on the embedded model.


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_transformers_serve_gives_what_transformers_gives(tmp_path):
    missing = [m for m in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"`transformers serve` needs {', '.join(missing)}: pip install 'transformers[serving]'")
    from rgsd.models import load_model, load_tokenizer, save_model

    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    # What a checkpoint may bring along; the server would take it over.
    model.generation_config.repetition_penalty = 1.5
    save_model(model, tokenizer, tmp_path / "model")
    prompts = [
        asked("Name three fruits."),
        asked("Say hello."),
        [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Is rest good for a cough?"},
        ],
        asked("Why is the sky blue? Explain it to a child in two sentences."),
    ]
    wanted = TransformersGenerator(model, tokenizer, SamplingConfig(24), batch_size=4).generate(prompts)
    with transformers_serve(tmp_path / "model", tmp_path / "log") as address:
        served = ServerGenerator(
            str(tmp_path / "model"),
            SamplingConfig(24),
            api_base=address,
            concurrency=4,
            extra_body={"frequency_penalty": 0.0},
        ).generate(prompts)
        assert [(r.text, r.is_truncated) for r in served] == [(r.text, r.is_truncated) for r in wanted]
        assert {r.is_truncated for r in served} == {True, False}
        # The server counts the end of sequence.
        assert [r.n_tokens for r in served] == [r.n_tokens + (not r.is_truncated) for r in wanted]
        with pytest.raises(ModelError, match=r"Server is pinned to .*; requested 'other'"):
            ServerGenerator("other", SamplingConfig(4), api_base=address).generate(prompts[:1])
        with pytest.raises(ModelError, match=r"Unexpected fields in the request: \{'top_k'\}.*extra_body"):
            ServerGenerator(
                str(tmp_path / "model"), SamplingConfig(4), api_base=address, extra_body={"top_k": 1}
            ).generate(prompts[:1])


class transformers_serve:
    """`transformers serve` on a folder, in a process of its own; yields the address once it is up."""

    def __init__(self, folder: Path, log: Path, seconds: float = 120.0):
        self.folder, self.log, self.seconds = folder, log, seconds

    def __enter__(self) -> str:
        import httpx

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self.folder), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    return f"http://127.0.0.1:{port}/v1"
            except httpx.TransportError:
                time.sleep(0.2)
        self.__exit__()
        raise AssertionError(f"`transformers serve` did not come up: {self.log.read_text()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_that_names_model_and_weight(tokenizer, monkeypatch, fast, temperature):
    """Greedy decoding treats NaN as the most likely token, so an evaluation once reported a score of 0."""
    monkeypatch.setenv("RGSD_FAST", str(int(fast)))
    broken = tiny_model(tokenizer)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    broken.config._name_or_path = "some/model"
    generator = TransformersGenerator(broken, tokenizer, SamplingConfig(4, temperature=temperature))
    with pytest.raises(ModelError, match=r"some/model.*layers\.1\.self_attn\.v_proj\.weight"):
        generator.generate(PROMPTS)
