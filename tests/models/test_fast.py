"""The decode loop, the sampler and the packed linear layers, each compared with the plain path."""

import copy
from collections import Counter

import pytest
import torch
from conftest import stir_adapters, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rgsd.errors import ConfigError
from rgsd.models.kernels import decoding, linears, products
from rgsd.models.kernels.sampling import BLOCK, TOP_ENTRIES, Sampling, pick

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 5, "bos_token_id": 1,
    "initializer_range": 0.3,
}  # fmt: skip
COVERED = [
    (LlamaForCausalLM, LlamaConfig(**SMALL)),
    (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
    (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=8)),
    (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=0.5)),
    (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.5)),
    (LlamaForCausalLM, LlamaConfig(**SMALL, attn_implementation="eager")),
]
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(kind, config, seed=0):
    torch.manual_seed(seed)
    return kind(copy.deepcopy(config)).eval()


def prompts(n=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (n,), generator=g).tolist()
    return [torch.randint(6, 97, (k,), generator=g).tolist() for k in lengths]


def by_transformers(model, prompts, config):
    """`generate` on left-padded prompts, cut after the first end-of-sequence token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    cut = [next((k + 1 for k, t in enumerate(row) if t in ends), len(row)) for row in out]
    return [row[:k] for row, k in zip(out, cut, strict=True)]


def settings(**changes):
    return GenerationConfig(
        **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": [5, *range(11, 21)], "pad_token_id": 0, **changes}
    )


@pytest.mark.parametrize(("kind", "config"), COVERED, ids=lambda x: getattr(x, "model_type", None))
def test_greedy_tokens_are_those_of_generate(kind, config):
    model = made(kind, config)
    assert decoding.covers(model)
    want = by_transformers(model, prompts(), settings())
    assert len({len(row) for row in want}) > 2  # rows that end early and late
    assert decoding.generate(model, prompts(), settings()) == want


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_how_many_rows_decode_at_once_changes_no_token(rows, monkeypatch):
    monkeypatch.setattr(decoding, "INITIAL_ROOM", 3)  # the cache must grow
    model = made(*COVERED[0])
    what = decoding.DecodingSettings(Sampling(1.0), (5, 11), 24)
    draws = torch.rand(13, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    order = []

    def run(rows, done=None):
        with decoding.ready(model, rows):
            return decoding.decode(model, prompts(), what, rows=rows, draws=lambda i: draws[i], done=done)

    got = run(rows, lambda i, tokens: order.append((i, tokens)))
    assert got == run(13)
    assert dict(order) == dict(enumerate(got))
    assert len(order) == 13
    alone = [decoding.decode(model, [p], what, rows=1, draws=lambda _, i=i: draws[i]) for i, p in enumerate(prompts())]
    assert [a[0] for a in alone] == got


def test_lora_is_added_in_and_nothing_is_left_behind():
    model = get_peft_model(made(*COVERED[0]), copy.deepcopy(LORA))
    stir_adapters(model, 0.3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plain = decoding.generate(made(*COVERED[0]), prompts(), settings())
    model.train()
    got = decoding.generate(model, prompts(), settings())
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any("forward" in vars(m) for m in model.modules())
    model.eval()
    assert got == by_transformers(model, prompts(), settings()) != plain
    with model.disable_adapter():
        assert decoding.generate(model, prompts(), settings()) == plain


def test_packed_layers_give_what_plain_ones_give(monkeypatch):
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    model = get_peft_model(made(*COVERED[1]), copy.deepcopy(LORA))  # Qwen2 has biases
    stir_adapters(model, 0.3, biases=True)
    model.eval()
    ids = torch.tensor(prompts(1)[:1])
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with linears.packed(model, 4):
            got = model(input_ids=ids).logits
        assert products.has_onednn()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert not torch.equal(got, want)  # another kernel has been at work
        with linears.packed(model, 4, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            low = model(input_ids=ids).logits
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), want, atol=0.5, rtol=0.1)


def test_frozen_layers_give_the_values_and_gradients_of_plain_ones(monkeypatch):
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    model = get_peft_model(made(*COVERED[1]), LoraConfig(r=4, target_modules="all-linear"))
    stir_adapters(model, 0.3, biases=True)
    ids = torch.tensor(prompts(1)[:1])

    def passed():
        model.zero_grad()
        loss = model(input_ids=ids).logits.logsumexp(-1).sum()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want, wanted = passed()
    calls = []
    for kind in (products.FrozenLinear, products.AdaptedLinear):

        def counted(ctx, grad, kind=kind, real=kind.backward):
            calls.append(kind)
            return real(ctx, grad)

        monkeypatch.setattr(kind, "backward", counted)
    with linears.frozen(model):
        got, gotten = passed()
    assert Counter(calls) == {products.AdaptedLinear: 14, products.FrozenLinear: 1}  # two layers of seven; the head
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert gotten.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gotten[name], gradient, atol=1e-3, rtol=1e-4)
    assert not any("forward" in vars(m) for m in model.modules())
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with linears.frozen(model):
        passed()
    assert not calls


def test_a_product_that_needs_a_gradient_has_one(monkeypatch):
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    products.linear(x, weight).square().sum().backward()
    want = 2 * (x @ weight.T) @ weight
    torch.testing.assert_close(x.grad, want)
    assert weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(products.linear(x, weight), x @ weight.T)
        torch.testing.assert_close(products.linear(x @ weight.T, weight.T), x @ weight.T @ weight)
        assert products.linear(x[:0], weight).shape == (0, 3)


def test_where_there_is_no_onednn_or_no_memory_torch_does_it(monkeypatch):
    want = decoding.generate(made(*COVERED[0]), prompts(), settings())
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    monkeypatch.setattr(linears, "MEMORY_SHARE", 0.0)
    assert decoding.generate(made(*COVERED[0]), prompts(), settings()) == want
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    assert decoding.generate(made(*COVERED[0]), prompts(), settings()) == want


@pytest.mark.parametrize("how", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.6, "top_p": 0.9}])
def test_sampled_tokens_have_the_distribution_of_generate(how):
    """A chi-square of the two samples' first and second tokens."""
    model = made(LlamaForCausalLM, LlamaConfig(**{**SMALL, "initializer_range": 0.15}))
    config = settings(
        max_new_tokens=2, do_sample=True, eos_token_id=None, **{"top_k": 0, "temperature": 1.0, "top_p": 1.0, **how}
    )
    model.generation_config.eos_token_id = None
    many = [prompts(1)[0]] * 3000
    torch.manual_seed(0)
    ours = torch.tensor(decoding.generate(model, many, config))
    theirs = torch.tensor(by_transformers(model, many, config))
    for place in (0, 1):
        a, b = (x[:, place].bincount(minlength=97).double() for x in (ours, theirs))
        kept = a + b >= 10
        square = ((a - b) ** 2 / (a + b))[kept].sum().item()
        dof = int(kept.sum()) - 1
        assert square < dof + 4 * (2 * dof) ** 0.5, (square, dof)
        assert (a > 0).sum() > 3


def test_a_config_that_asks_for_more_is_left_to_transformers():
    model = made(*COVERED[0])
    for more in (
        {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}, {"num_beams": 2}, {"suppress_tokens": [7]},
        {"min_new_tokens": 3}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False},
        {"cache_implementation": "static"}, {"stop_strings": ["a"]}, {"max_new_tokens": None},
    ):  # fmt: skip
        assert decoding.generate(model, prompts(), settings(**more)) is None, more
    model.generation_config.suppress_tokens = [7]  # the checkpoint's settings fill the gaps, as in `generate`
    assert decoding.generate(model, prompts(), settings()) is None


def test_models_that_it_does_not_know_are_left_to_transformers(monkeypatch):
    sliding = made(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8))
    assert not decoding.covers(sliding)
    assert not decoding.covers(made(Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8)))
    dora = get_peft_model(made(*COVERED[0]), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert not decoding.covers(dora)
    meta = LlamaForCausalLM(COVERED[0][1]).to("meta")
    assert not decoding.covers(meta)
    own = made(*COVERED[0])
    assert decoding.covers(own)
    own.generate = lambda *_, **__: None
    assert not decoding.covers(own)
    monkeypatch.setenv("RGSD_FAST", "0")
    assert decoding.generate(made(*COVERED[0]), prompts(), settings()) is None


def test_a_covered_model_of_learned_positions_agrees_too():
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=5, bos_token_id=1,
        initializer_range=0.3, resid_pdrop=0.0,
    )  # fmt: skip
    model = made(GPT2LMHeadModel, config)
    got = decoding.generate(model, prompts(), settings())
    assert got is None or got == by_transformers(model, prompts(), settings())


# The sampler alone.


def shares(logits_V, how, n=40000, seed=0):
    draws_B = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pick(logits_V.expand(n, -1), draws_B, how).bincount(minlength=len(logits_V)) / n


def by_hand(logits_V, how):
    """Temperature, top-k, top-p, min-p, one after the other, on one sorted row."""
    probs, words = (logits_V.double() / how.temperature).softmax(-1).sort(descending=True)
    if how.top_k:
        probs[how.top_k :] = 0
    probs /= probs.sum()
    probs[probs.cumsum(-1) - probs >= how.top_p] = 0
    probs[probs < how.min_p * probs[0]] = 0
    return torch.zeros_like(probs).scatter(0, words, probs / probs.sum())


@pytest.mark.parametrize("vocabulary", [5, 4 * BLOCK + 1, 8 * BLOCK])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_p=0.6),
        Sampling(2.0, min_p=0.3),
        Sampling(1.5, top_p=0.9, top_k=4, min_p=0.05),
    ],
    ids=str,
)
def test_shares_are_the_probabilities(vocabulary, how):
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    logits_V[2] = -torch.inf
    got, want = shares(logits_V, how), by_hand(logits_V, how)
    assert (got - want).abs().max() < 0.012
    assert got[want == 0].sum() == 0


def test_the_draw_inverts_the_cumulative_distribution():
    """Token v is picked exactly by draws between the cumulative probabilities before and at it."""
    for vocabulary in (7, 5 * BLOCK + 3):
        logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
        upto = logits_V.double().softmax(-1).cumsum(-1)
        middle = upto - logits_V.double().softmax(-1) / 2
        assert pick(logits_V.expand(vocabulary, -1), middle, Sampling()).tolist() == list(range(vocabulary))
    last = torch.tensor([0.0, 1.0, -torch.inf])
    assert pick(last[None], torch.tensor([1 - 2**-53], dtype=torch.float64), Sampling()).item() == 1


def test_a_flat_row_is_sorted_whole_where_top_p_wants_more_than_the_likeliest():
    flat = torch.zeros(4 * TOP_ENTRIES)
    peaked = flat.clone()
    peaked[9] = 30.0
    draws = torch.tensor([0.999999, 0.5], dtype=torch.float64)
    both = pick(torch.stack([flat, peaked]), draws, Sampling(top_p=0.9))
    assert both[1].item() == 9
    assert pick(flat[None], draws[:1], Sampling(top_p=0.9)).item() == both[0].item()
    n_kept = (shares(flat, Sampling(top_p=0.9), n=20000) > 0).sum().item()
    assert 0.88 * 4 * TOP_ENTRIES < n_kept <= 0.9 * 4 * TOP_ENTRIES + 1


def test_what_is_picked_depends_on_the_rows_own_draw_alone():
    g = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(9, 3000, generator=g) * 4
    draws_B = torch.rand(9, generator=g, dtype=torch.float64)
    for how in (Sampling(0.7), Sampling(1.0, top_p=0.7), Sampling(1.0, top_k=20), Sampling(3.0, top_p=0.95)):
        whole = pick(logits_BV, draws_B, how)
        assert [pick(logits_BV[i : i + 1], draws_B[i : i + 1], how).item() for i in range(9)] == whole.tolist()


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.5}])
def test_sampling_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_tiny_models_tokens_end_in_its_end(tokenizer):
    model = tiny_model(tokenizer)
    out = decoding.generate(model, [[40, 41], [50]], settings(eos_token_id=tokenizer.eos_token_id, max_new_tokens=200))
    assert all(tokenizer.eos_token_id not in row[:-1] for row in out)
    assert all(len(row) == 200 or row[-1] == tokenizer.eos_token_id for row in out)
