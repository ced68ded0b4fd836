"""The sampler and the loss: their log-probabilities agree, differences are reported, and no checkpoint changes how
rollouts are sampled."""

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from peft import LoraConfig
from test_grpo import arguments
from test_trainer import config

from rgsd.judges import ChecksJudge
from rgsd.models.kernels.sampling import Sampling, pick_scored
from rgsd.training.grpo import RubricGRPOTrainer, RubricReward, grpo_rows
from rgsd.training.loss import DivergenceSpec, Head, chunked_divergence
from rgsd.training.metrics import StepMetrics
from rgsd.training.trainer import RGSDTrainer

MEAN, MAX = (f"sampling/sampling_logp_difference/{which}" for which in ("mean", "max"))
LORA = LoraConfig(r=4, target_modules="all-linear")


def trained(tmp_path, tokenizer, examples, model=None, peft_config=None, **kwargs):
    trainer = RGSDTrainer(
        model or tiny_model(tokenizer),
        args=config(tmp_path, max_steps=2, **kwargs),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_the_decode_loop_and_the_loss_agree(tmp_path, tokenizer, examples, peft_config):
    for log in trained(tmp_path, tokenizer, examples, peft_config=peft_config)[:2]:
        assert 0 < log[MEAN] <= log[MAX] < 1e-4


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"top_k": 3}, "top_k=3"),
        ({"top_p": 0.5}, "top_p=0.5"),
        ({"min_p": 0.2}, "min_p=0.2"),
        ({"temperature": 0.5, "loss_temperature": 1.0}, "temperature=0.5"),
    ],
)
def test_what_makes_rollouts_off_policy_is_said_once_and_measured(tmp_path, tokenizer, examples, capsys, setting, said):
    logs = trained(tmp_path, tokenizer, examples, **setting)
    printed = capsys.readouterr().out
    assert printed.count("off-policy") == 1
    assert said in printed
    assert all(log[MAX] > 0.05 for log in logs[:2])


def test_on_policy_settings_are_not_warned_of(tmp_path, tokenizer, examples, capsys):
    trained(tmp_path, tokenizer, examples, temperature=0.7)  # the loss has it too
    assert "off-policy" not in capsys.readouterr().out


def test_vllms_log_probabilities_are_kept(tmp_path, tokenizer, examples):
    """TRL requests none and discards them; this engine returns -1 for every token, and None for one."""

    class Engine:
        logprobs = None

        def generate(self, prompts, **kwargs):
            assert self.logprobs == 0  # the sampled token's
            rows = [[50, 51, tokenizer.eos_token_id]] * len(prompts)
            return prompts, rows, [[[-1.0], [None], [-1.0]]] * len(prompts), None

        def sync_weights(self):
            pass

    trainer = RGSDTrainer(
        tiny_model(tokenizer), args=config(tmp_path, max_steps=1), train_dataset=examples, processing_class=tokenizer
    )
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
    rollouts = trainer._rollouts(list(trainer.train_dataset)[:2])
    assert [r.sampler_log_p[::2] for r in rollouts] == [[-1.0, -1.0]] * 2
    assert all(torch.tensor(r.sampler_log_p[1]).isnan() for r in rollouts)
    assert trainer.vllm_generation.logprobs is None
    trainer._step_metrics = StepMetrics()
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log[MEAN] <= log[MAX]


@pytest.mark.parametrize("fast", ["1", "0"])
def test_a_checkpoints_sampling_settings_are_not_taken_up(tmp_path, tokenizer, examples, monkeypatch, capsys, fast):
    monkeypatch.setenv("RGSD_FAST", fast)

    def responses(**of_checkpoint):
        model = tiny_model(tokenizer)
        for name, value in of_checkpoint.items():
            setattr(model.generation_config, name, value)
        trainer = RGSDTrainer(
            model, args=config(tmp_path), train_dataset=examples, processing_class=tokenizer
        )  # fmt: skip
        prompts = trainer._tokenize_messages([r["prompt"] for r in trainer.train_dataset])
        torch.manual_seed(3)
        found = trainer._generate_single_turn(prompts, None, {})
        assert all(getattr(model.generation_config, n) == v for n, v in of_checkpoint.items())
        return found

    plain = responses()
    capsys.readouterr()
    assert responses(min_p=0.9, no_repeat_ngram_size=1, suppress_tokens=[50, 51, 52]) == plain
    assert "min_p 0.9" in capsys.readouterr().out


def test_nor_are_they_under_grpo(tmp_path, tokenizer, examples):
    def responses(**of_checkpoint):
        model = tiny_model(tokenizer)
        for name, value in of_checkpoint.items():
            setattr(model.generation_config, name, value)
        trainer = RubricGRPOTrainer(
            model,
            args=arguments(tmp_path),
            reward_funcs=RubricReward(examples, ChecksJudge()),
            train_dataset=Dataset.from_list(grpo_rows(examples)),
            processing_class=tokenizer,
        )
        torch.manual_seed(3)
        return trainer._generate_single_turn([[5, 6, 7]] * 6, None, {}, 6)[0]

    assert responses(min_p=0.9, no_repeat_ngram_size=1) == responses()


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(1.0, 0.6), Sampling(1.3, top_k=5), Sampling(min_p=0.1)])
@pytest.mark.parametrize("vocabulary", [40, 3000])
def test_a_picks_log_probability_is_that_of_the_distribution_it_was_picked_from(how, vocabulary):
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    n = 20_000
    tokens, log_ps = pick_scored(logits_V.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n, how)
    shares = tokens.bincount(minlength=vocabulary) / n
    for token in shares.topk(4).indices.tolist():
        assert log_ps[tokens == token][0].exp() == pytest.approx(float(shares[token]), abs=2e-3)


def test_the_loss_returns_the_sampled_tokens_log_probability():
    torch.manual_seed(0)
    hidden_NH, head = torch.randn(9, 8), Head(torch.randn(30, 8))
    sampled_N = torch.randint(30, (9,))
    spec = DivergenceSpec(temperature=0.7, chunk_tokens=4)
    found = chunked_divergence(hidden_NH, head, torch.randn(9, 8), head, spec, sampled_N).sampled_log_p_N
    want = (head.logits(hidden_NH) / 0.7).log_softmax(-1).gather(1, sampled_N[:, None])[:, 0]
    torch.testing.assert_close(found, want)
