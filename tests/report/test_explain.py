"""`rgsd explain`: its numbers equal a plain computation's, and errors say what it cannot explain."""

import json
import math

import numpy as np
import pytest
import torch
from support.made_runs import make_runs
from support.reports import Page

from rgsd import models
from rgsd.cli import main
from rgsd.data import load
from rgsd.data.config import DataConfig
from rgsd.errors import ConfigError, DataError, PromptTooLong, RunError
from rgsd.prompts.messages import PromptSettings, student_messages, teacher_messages
from rgsd.prompts.thinking import align
from rgsd.report import TOKEN_MAPS, token_page
from rgsd.report.token_map import ExplainConfig, explain, summary, token_rows
from rgsd.runs import create_run, open_run
from rgsd.training.loss import DivergenceSpec

TEXT = "Drink water and rest. \N{HOT BEVERAGE}\ufe0f \N{FACE WITH THERMOMETER}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    return make_runs(tmp_path_factory.mktemp("explained"), tokenizer)


@pytest.fixture
def response(tmp_path):
    (tmp_path / "response.txt").write_text(TEXT + "\n")
    return str(tmp_path / "response.txt")


def data_of(runs):
    return DataConfig(data=str(runs / "data.jsonl"))


def plain(model, tokenizer, prompt, ids):
    """Log-probabilities of the vocabulary at every response token, in float64, from one full forward pass."""
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0].double().numpy()
    logits = logits[len(prompt_ids) - 1 : -1]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def jsd_entries(teacher, student, beta):
    m = np.log(beta * np.exp(teacher) + (1 - beta) * np.exp(student))
    return beta * np.exp(teacher) * (teacher - m) + (1 - beta) * np.exp(student) * (student - m)


def check(found, tokenizer, teacher, student, ids, entries, threshold):
    assert len(found["tokens"]) == len(ids)
    for n, row in enumerate(found["tokens"]):
        assert row["d"] == pytest.approx(entries[n].sum(), rel=1e-3, abs=1e-6)
        assert row["c"] == pytest.approx(np.minimum(entries[n], threshold).sum(), rel=1e-3, abs=1e-6)
        assert row["pt"] == pytest.approx(math.exp(teacher[n, ids[n]]), rel=1e-3)
        assert row["ps"] == pytest.approx(math.exp(student[n, ids[n]]), rel=1e-3)
        for words, log_p in ((row["T"], teacher[n]), (row["S"], student[n])):
            top = np.argsort(-log_p)[: len(words)]
            assert [p for _, p in words] == pytest.approx(np.exp(log_p[top]).tolist(), rel=1e-3)
            assert words[0][0] == tokenizer.decode([int(top[0])])
    assert found["mean"] == pytest.approx(np.mean([e.sum() for e in entries]), rel=1e-3)


def test_numbers_of_a_model_are_the_plain_ones(runs, response, tokenizer):
    settings = ExplainConfig(response=response, template="cover", clip_threshold=0.01, beta=0.3, top_tokens=3)
    found = explain(str(runs / "model"), "r3", data_of(runs), settings)
    example = next(e for e in load(str(runs / "data.jsonl")).examples if e.id == "r3")
    model = models.load_model(str(runs / "model"))
    ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    student = plain(model, tokenizer, student_messages(example), ids)
    teacher = plain(model, tokenizer, teacher_messages(example, PromptSettings(template="cover")), ids)
    check(found, tokenizer, teacher, student, ids, jsd_entries(teacher, student, 0.3), 0.01)
    assert found["mean_clipped"] < found["mean"]
    assert found["question"] == example.messages[-1]["content"]
    assert [c["criterion"] for c in found["criteria"]] == [c.text for c in example.rubric]
    assert found["tokens"][-1]["x"] == 1  # the end of sequence


def test_of_a_run_the_student_is_trained_and_the_teacher_is_its_base(runs, response, tokenizer):
    found = explain(str(runs / "rgsd"), "r3", DataConfig(), ExplainConfig(response=response, clip="none", beta=0.0))
    example = next(e for e in load(str(runs / "data.jsonl")).examples if e.id == "r3")
    ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    trained, _ = models.load_trained(runs / "rgsd")
    student = plain(trained, tokenizer, student_messages(example), ids)
    teacher = plain(models.load_model(str(runs / "model")), tokenizer, teacher_messages(example, PromptSettings()), ids)
    check(found, tokenizer, teacher, student, ids, np.exp(teacher) * (teacher - student), math.inf)
    base = explain(f"{runs / 'rgsd'}:base", "r3", DataConfig(), ExplainConfig(response=response, clip="none", beta=0.0))
    assert (found["policy"], base["policy"]) == ("trained", "base")
    assert [t["pt"] for t in found["tokens"]] == [t["pt"] for t in base["tokens"]]
    assert [t["ps"] for t in found["tokens"]] != [t["ps"] for t in base["tokens"]]


def test_a_teacher_that_is_shown_nothing_pulls_nowhere(runs, response):
    found = explain(
        str(runs / "model"), "r0", data_of(runs), ExplainConfig(response=response, privileged_context="none")
    )
    assert max(t["d"] for t in found["tokens"]) < 1e-6
    assert not any(c["is_shown"] for c in found["criteria"])


def test_the_mismatched_control_shows_another_rubric_of_the_same_side(runs, response):
    settings = ExplainConfig(response=response, privileged_context="mismatched")
    held_out = json.loads((runs / "rgsd" / "split.json").read_text())["held_out"]
    found = explain(f"{runs / 'rgsd'}:base", held_out[0], DataConfig(), settings)
    shown = found["teacher_prompt"][-1]["content"]
    number = held_out[0][1:]
    others = [f"syrup</b> {i[1:]}." for i in held_out[1:]]
    assert f"syrup</b> {number}." not in shown
    assert sum(o in shown for o in others) == 1


def test_the_stored_response_of_a_run_is_taken_and_its_settings_too(runs):
    run = open_run(runs / "rgsd")
    held_out = json.loads((run.folder / "split.json").read_text())["held_out"]
    stored = {(r["arm"], r["example_id"]): r["text"] for r in run.read_lines("responses.jsonl")}
    for name, arm in ((str(run.folder), "trained"), (f"{run.folder}:base", "base")):
        found = explain(name, None, DataConfig(), ExplainConfig())
        assert found["example_id"] == held_out[0]
        assert found["source"] == f"the run's stored response of `{arm}`"
        text = "".join(t["t"] for t in found["tokens"]).removesuffix("<|im_end|>")
        assert text == stored[(arm, held_out[0])]
    assert found["settings"]["clip"] == "entry"
    assert found["settings"]["clip_threshold"] == 0.05
    other = explain(f"{run.folder}:base", None, DataConfig(), ExplainConfig(arm="trained"))
    assert other["source"].endswith("`trained`")


def test_a_sampled_response_depends_on_the_seed_alone(runs):
    def sampled(seed):
        settings = ExplainConfig(resample=True, seed=seed, max_new_tokens=6)
        return [t["t"] for t in explain(f"{runs / 'rgsd'}:base", "r1", DataConfig(), settings)["tokens"]]

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_reasoning_is_shown_and_left_out_of_the_means(runs, tmp_path):
    (tmp_path / "r.txt").write_text("<think>rest, or a doctor?</think>Drink water.")
    found = explain(str(runs / "model"), "r0", data_of(runs), ExplainConfig(response=str(tmp_path / "r.txt")))
    kept = [t for t in found["tokens"] if t["m"]]
    assert "".join(t["t"] for t in kept) == "Drink water.<|im_end|>"
    assert found["n_in_loss"] == len(kept) < found["n_tokens"]
    assert found["mean"] == pytest.approx(sum(t["d"] for t in kept) / len(kept))
    (tmp_path / "r.txt").write_text("<think>never closed")
    found = explain(str(runs / "model"), "r0", data_of(runs), ExplainConfig(response=str(tmp_path / "r.txt")))
    assert found["mean"] is None
    assert "No token of this response is in the loss" in Page(token_page(found)).words


def test_token_texts_join_to_the_text(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    texts = align(ids, tokenizer).token_texts()
    assert "".join(texts) == TEXT
    assert "" in texts  # tokens that share a character
    assert "\ufffd" not in "".join(texts)
    assert "".join(align(ids[:-1], tokenizer).token_texts()).endswith("\ufffd")  # a character cut in two is not hidden


def test_logits_are_compared_in_pieces_without_a_seam(tokenizer):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 300, len(tokenizer))
    ids = list(range(3, 103)) * 3
    spec = DivergenceSpec()
    whole = token_rows(student, teacher, ids, [True] * 300, tokenizer, spec, 2)
    last = token_rows(student[-40:], teacher[-40:], ids[-40:], [True] * 40, tokenizer, spec, 2)
    assert [r["d"] for r in whole[-40:]] == [r["d"] for r in last]
    found = summary(whole)
    assert found["top_tenth_share"] == pytest.approx(
        sum(sorted((r["d"] for r in whole), reverse=True)[:30]) / sum(r["d"] for r in whole)
    )


@pytest.mark.parametrize(
    ("name", "example", "settings", "error", "match"),
    [
        ("{}/model", "r33", {}, DataError, "'r33' among 10, for example r3"),
        ("{}/model", "r0", {"keep": True}, ConfigError, "--keep"),
        ("{}/model+rubric", "r0", {}, ConfigError, "--privileged_context rubric"),
        ("{}/model:base", "r0", {}, RunError, "is not a run's folder"),
        ("{}/model", "r0", {"response": "/no/such.txt"}, DataError, "/no/such.txt"),
        ("{}/rgsd", "r0", {"arm": "other"}, RunError, "no stored response of arm 'other'"),
        ("{}/model", "r0", {"response": "long"}, PromptTooLong, "1,024 positions"),
    ],
)
def test_what_cannot_be_explained_is_refused(runs, tmp_path, name, example, settings, error, match):
    if settings.get("response") == "long":
        (tmp_path / "long.txt").write_text("cough " * 1100)
        settings = {"response": str(tmp_path / "long.txt")}
    data = DataConfig() if "rgsd" in name else data_of(runs)
    with pytest.raises(error, match=match):
        explain(name.format(runs), example, data, ExplainConfig(**settings))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="response and arm"):
        ExplainConfig(response="x", arm="base")
    with pytest.raises(ConfigError, match="top_tokens"):
        ExplainConfig(top_tokens=0)


def test_evaluations_and_unfinished_runs_are_told_from_models(runs, tmp_path):
    create_run(tmp_path / "eval", {"models": ["x"]})
    with pytest.raises(RunError, match="is an evaluation"):
        explain(str(tmp_path / "eval"), None, DataConfig(), ExplainConfig())
    create_run(tmp_path / "early", {"model_name_or_path": str(runs / "model")})
    with pytest.raises(RunError, match="early:base, or finish the run"):
        explain(str(tmp_path / "early"), None, data_of(runs), ExplainConfig())


def test_the_command_writes_the_page_and_keeps_the_map(runs, tmp_path, capsys):
    out = tmp_path / "map.html"
    call = ["explain", f"{runs / 'rgsd'}:base", "-o", str(out), "--keep", "true"]
    assert main(call) == 0
    assert "nats per token" in capsys.readouterr().out
    seen = Page(out.read_text())
    (kept,) = open_run(runs / "rgsd").read_lines(TOKEN_MAPS)
    assert seen.data["maps"] == [kept]
    assert "How far the rubric moves each token" in seen.words
    assert main(call) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["report", str(runs / "rgsd"), "-o", str(tmp_path / "report.html")]) == 0
    assert Page((tmp_path / "report.html").read_text()).data["maps"] == [kept | {"run": ""}]
    model = ["explain", str(runs / "model"), "r2", "--data", str(runs / "data.jsonl"), "--max_new_tokens", "4"]
    assert main([*model, "-o", str(tmp_path / "map.json")]) == 0
    assert json.loads((tmp_path / "map.json").read_text())["example_id"] == "r2"
    assert main(["explain"]) == 2
