"""Two gloo processes, under DDP and FSDP2, give the same results as one process on the same data."""

import pytest
import torch
from support.processes import (
    together,
    train,
    train_and_be_told_while_asking,
    train_into_nan,
    train_until_stopped,
    train_with_an_engine_that_is_sent_merges,
    train_with_development,
)

from rgsd.training.checkpoints import last_complete, list_checkpoints

pytestmark = pytest.mark.integration

ENGINES = ["ddp", "fsdp2"]
FSDP2 = [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"]
"""DDP, which is simpler, only in the slow tests."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    made = tmp_path_factory.mktemp("distributed")
    tokenizer.save_pretrained(made / "tokenizer")
    return made


def assert_close(got, want, part, **tolerance):
    assert got[part].keys() == want[part].keys()
    assert got[part], part
    for name, value in want[part].items():
        torch.testing.assert_close(got[part][name], value, **({"atol": 2e-6, "rtol": 1e-4} | tolerance), msg=name)


KINDS = {
    "full, trained head": {"train_head": True, "tied": False, "teacher_model_kind": "base"},
    "full, tied head, average": {"train_head": True, "teacher_model_kind": "ema", "teacher_update_rate": 0.3},
    "full, frozen head": {"tied": False, "teacher_model_kind": "base"},
    "lora": {"lora": True, "tied": False},
    "lora, tied, average": {"lora": True, "teacher_model_kind": "ema", "teacher_update_rate": 0.3},
    "lora, trained head": {"lora": True, "tied": False, "train_head": True},
}


QUICK = ("full, tied head, average", "lora")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_two_processes_give_the_gradient_and_the_weights_of_one(folder, engine, kind):
    (one,) = together(train, folder, world=1, folder=str(folder), **KINDS[kind])
    two = together(train, folder, engine=engine, folder=str(folder), **KINDS[kind])
    assert (two[0]["sharded"] > 0) == (engine == "fsdp2")
    for got in two:
        assert_close(got, one, "gradient")
        assert_close(got, one, "weights", atol=2e-5)
        if "average" in kind:
            assert_close(got, one, "teacher", atol=2e-5)
    assert two[0]["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-4)
    assert two[0]["history"][0]["divergence"] == pytest.approx(one["history"][0]["divergence"], rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_without_a_token_in_the_loss_still_takes_part(folder, engine, lora):
    """The second process has the four longer prompts, and none of their tokens is in the loss."""
    settings = {"lora": lora, "train_head": not lora, "tied": False, "empty_from": 38}
    (one,) = together(train, folder, world=1, folder=str(folder), **settings)
    two = together(train, folder, engine=engine, folder=str(folder), **settings)
    assert 0 < one["history"][0]["masked_share"] < 1
    assert_close(two[1], one, "gradient")
    assert_close(two[1], one, "weights", atol=2e-5)
    assert two[0]["history"][0]["masked_share"] == pytest.approx(one["history"][0]["masked_share"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_and_checkpointing_on_two_processes_change_nothing(folder, engine):
    settings = {"train_head": True, "tied": False}
    (one,) = together(train, folder, world=1, folder=str(folder), **settings)
    split = {**settings, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    two = together(train, folder, engine=engine, folder=str(folder), **split)
    assert_close(two[0], one, "gradient")


@pytest.mark.parametrize("engine", FSDP2)
def test_rollouts_are_sampled_on_two_processes(folder, engine):
    """Processes have different prompts and responses of different lengths, and equal weights afterwards."""
    two = together(train, folder, engine=engine, folder=str(folder), sampled=True, lora=True, steps=3)
    for name, value in two[0]["weights"].items():
        assert torch.equal(value, two[1]["weights"][name]), name
    assert two[0]["history"][2]["response_length"] > 0


# From a checkpoint after step 3 of 6; an epoch has two steps, so that step 3 lies within the second.
RESUMED = {"rows": 4, "save_strategy": "steps", "save_steps": 3, "shuffle_dataset": True, "learning_rate": 0.01}
FULL = {"train_head": True, "tied": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.3}
LORA = {"lora": True, "tied": False}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_two_processes_go_on_bit_for_bit(folder, engine, kind, tmp_path):
    settings = {**RESUMED, **kind, "sampled": True, "steps": 6}
    whole = together(train, tmp_path, engine=engine, folder=str(folder), output=str(tmp_path / "run"), **settings)
    again = together(
        train,
        tmp_path,
        engine=engine,
        folder=str(folder),
        output=str(tmp_path / "run"),
        resume=str(tmp_path / "run" / "checkpoint-3"),
        **settings,
    )
    for rank in range(2):
        for part in ("weights", "teacher"):
            for name, value in whole[rank][part].items():
                assert torch.equal(again[rank][part][name], value), name
    assert [h["loss"] for h in again[0]["history"] if "loss" in h] == [
        h["loss"] for h in whole[0]["history"] if "loss" in h
    ]


MOVES = [
    (("ddp", 2), ("ddp", 1)),
    (("ddp", 1), ("ddp", 2)),
    (("fsdp2", 2), ("ddp", 1)),
    (("ddp", 1), ("fsdp2", 2)),
    (("fsdp2", 2), ("ddp", 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("first", "then"), MOVES)
def test_a_checkpoint_goes_on_under_another_number_of_processes(folder, tmp_path, kind, first, then):
    """Responses depend only on the prompt here, so it does not matter that random numbers start anew."""
    settings = {**RESUMED, **kind, "steps": 6}
    (want,) = together(train, tmp_path, world=1, folder=str(folder), output=str(tmp_path / "one"), **settings)
    run = {"folder": str(folder), "output": str(tmp_path / "run"), **settings}
    together(train, tmp_path, engine=first[0], world=first[1], **run)
    resume = str(tmp_path / "run" / "checkpoint-3")
    got = together(train, tmp_path, engine=then[0], world=then[1], resume=resume, **run)
    assert_close(got[0], want, "weights", atol=1e-4)
    if kind is FULL:
        assert_close(got[0], want, "teacher", atol=1e-4)


@pytest.mark.parametrize("engine", FSDP2)
def test_sigterm_to_one_process_stops_both_after_the_same_step(folder, tmp_path, engine):
    said = together(
        train_until_stopped, tmp_path, engine=engine, folder=str(folder), output=str(tmp_path / "run"), lora=True
    )
    assert all(s.startswith("Interrupted: stopped by SIGTERM after step 3 of 4; checkpoint-3 is saved") for s in said)
    assert [c.name for c in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert last_complete(tmp_path / "run")


def test_sigterm_that_comes_while_processes_ask_each_other_is_not_lost(folder, tmp_path):
    said = together(train_and_be_told_while_asking, tmp_path, folder=str(folder), output=str(tmp_path / "run"))
    assert all(s.startswith("Interrupted: stopped by SIGTERM after step 2 of 4") for s in said)


def test_a_loss_that_is_no_number_in_one_process_stops_both_and_names_its_examples(folder, tmp_path):
    said = together(train_into_nan, tmp_path, folder=str(folder), output=str(tmp_path / "run"))
    for text in said:
        assert text.startswith("TrainingDiverged: step 2: the loss is nan, among the examples ")
        assert "e6" in text
        assert "e1" not in text  # of the other process


@pytest.mark.parametrize("engine", FSDP2)
def test_an_engine_is_sent_float32_merges_and_base_weights_stay_bit_for_bit(folder, engine):
    assert together(train_with_an_engine_that_is_sent_merges, folder, engine=engine, folder=str(folder)) == [True, True]


def test_the_first_process_scores_and_all_load_the_same_best_step(folder):
    """With two processes: the score of the first reaches the other, and evaluation changes no weight."""
    chosen = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 2}
    scores = [0.2, 0.5, 0.4, 0.3, 0.9]
    both = together(
        train_with_development, folder / "best", folder=str(folder), scores=scores, output="best", **chosen
    )  # fmt: skip
    assert [b["asked"] for b in both] == [[1, 2, 3, 4], []]
    assert [b["steps"] for b in both] == [4, 4]
    assert all(b["best"] == {"step": 2, "metric": "rubric_score", "value": 0.5} for b in both)
    plain = together(
        train_with_development, folder / "plain", folder=str(folder), scores=scores[:2], evaluated=False, output="plain"
    )  # fmt: skip
    for b in both:  # the weights of step 2, which are those of a run of two steps that was never evaluated
        assert b["weights"].keys() == plain[0]["weights"].keys()
        assert all(torch.equal(b["weights"][n], w) for n, w in plain[0]["weights"].items())


def test_what_fails_in_the_first_process_ends_both(folder):
    said = together(train_with_development, folder / "fails", folder=str(folder), scores=[0.1], fails=True, output="f")
    assert said == ["JudgeError: the judge is gone"] * 2


def test_fsdp_which_cuts_the_model_is_refused(folder):
    said = together(
        train_with_development, folder / "cut", engine="fsdp2", folder=str(folder), scores=[0.1], output="c"
    )
    assert all("ConfigError: FSDP leaves no process with the whole model" in text for text in said)
