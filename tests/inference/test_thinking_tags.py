"""Think tags reach every place that generates: training, gap, references; special tokens included."""

import copy
import json
from types import SimpleNamespace

import pytest
from conftest import tiny_model, write_recipes

from rgsd.cli import main
from rgsd.data.config import DataConfig, DataSplit
from rgsd.errors import ConfigError
from rgsd.evaluation import gap
from rgsd.evaluation.config import EvalConfig, MeasureConfig
from rgsd.evaluation.evaluate import with_tags_of
from rgsd.evaluation.gap import GapConfig
from rgsd.evaluation.responses import stored_responses
from rgsd.evaluation.run_ref import RunRef
from rgsd.inference import TransformersGenerator
from rgsd.judges import ChecksJudge, JudgeConfig
from rgsd.runs import create_run, open_run
from rgsd.training.config import RGSDConfig
from rgsd.workflows import train as pipeline
from rgsd.workflows.opening import OpenedRun
from rgsd.workflows.recipe import Recipe
from rgsd.workflows.setup import Job, Setup

OPEN, CLOSE = "[THINK]", "[/THINK]"


@pytest.fixture
def special(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    return made


class Reasoning(TransformersGenerator):
    """Writes the same reasoning and answer for every prompt, as token ids, with any model."""

    def _decode(self, ids, seeds, keep):
        row = self.tokenizer.encode(f"{OPEN}the rubric wants tea{CLOSE}Rest.", add_special_tokens=False)
        for i in range(len(ids)):
            keep(i, [*row, self.tokenizer.eos_token_id])
        return True


def test_the_pipelines_arms_are_judged_by_their_answers(special, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "TransformersGenerator", Reasoning)
    args = RGSDConfig(str(tmp_path / "out"), think_open_tag=OPEN, think_close_tag=CLOSE, use_cpu=True, report_to="none")
    recipe = Recipe(None, DataConfig(), EvalConfig(), args)
    run = create_run(str(tmp_path / "run"), {})
    job = Job(recipe, OpenedRun(run), DataSplit([], examples), ChecksJudge(), is_evaluated=True)
    setup = Setup(SimpleNamespace(processing_class=special), "weights", None)
    rows = pipeline._evaluate(job, setup, "base", tiny_model(special), "weights")
    assert {s.judged_text for s in rows} == {"Rest."}


def test_gaps_arms_and_rollouts_keep_both_tags(special, tmp_path, monkeypatch):
    monkeypatch.setattr(gap, "TransformersGenerator", Reasoning)
    tiny_model(special).save_pretrained(tmp_path / "model")
    special.save_pretrained(tmp_path / "model")
    lines = [
        json.dumps(
            {
                "id": f"r{i}",
                "prompt": f"Cough {i}?",
                "rubric": [{"criterion": f"Advises rest for {i} days.", "weight": 5, "check": {"any": ["rest"]}}],
            }
        )
        for i in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = MeasureConfig(
        output_dir=str(tmp_path / "gap"), think_open_tag=OPEN, think_close_tag=CLOSE, max_new_tokens=8, dtype="float32"
    )
    run = gap.gap(
        str(tmp_path / "model"),
        DataConfig(data=str(tmp_path / "data.jsonl")),
        JudgeConfig(),
        settings,
        GapConfig(templates=["paper"], rollout_tokens=32),
    )
    assert {r["judged_text"] for r in run.read_lines("samples.jsonl")} == {"Rest."}
    rollouts = stored_responses(run, "rollouts").values()
    assert {r.response.text for r in rollouts} == {f"{OPEN}the rubric wants tea{CLOSE}Rest."}


def made_run(folder, name, tags):
    run = create_run(folder / name, {"think_open_tag": tags[0], "think_close_tag": tags[1]})
    run.note(status="finished")
    return str(run.folder)


def test_a_runs_own_tags_count_where_none_are_set(tmp_path):
    special, plain = made_run(tmp_path, "a", (OPEN, CLOSE)), made_run(tmp_path, "b", ("<think>", "</think>"))

    def tags(*names, **settings):
        return with_tags_of([RunRef.parse_policy(n) for n in names], MeasureConfig(**settings)).think_tags

    assert tags(special) == tags(f"{special}:base", "owner/model") == (OPEN, CLOSE)
    assert tags(plain) == tags("owner/model") == ("<think>", "</think>")
    assert tags(special, think_open_tag="<r>", think_close_tag="</r>") == ("<r>", "</r>")
    with pytest.raises(ConfigError, match="reason between different tags"):
        tags(special, plain)


def test_eval_judges_a_runs_answers_by_its_own_tags(special, tmp_path, monkeypatch):
    monkeypatch.setattr("rgsd.evaluation.policies.TransformersGenerator", Reasoning)
    row = {"rubric": [{"criterion": "Advises rest.", "weight": 5, "check": {"any": ["rest"]}}]}
    rows = [row | {"id": f"r{i}", "prompt": f"What helps with a cough number {i}?"} for i in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_recipes(tmp_path, special)
    tags = ["--think_open_tag", OPEN, "--think_close_tag", CLOSE]
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--evaluate", "false", *tags]) == 0
    assert main(["eval", str(tmp_path / "run"), "--output_dir", str(tmp_path / "e"), "--max_new_tokens", "8"]) == 0
    run = open_run(tmp_path / "e")
    assert {r["judged_text"] for r in run.read_lines("samples.jsonl")} == {"Rest."}
    assert run.settings["think_open_tag"] == OPEN  # for what reads the responses again, as `rgsd audit` does
