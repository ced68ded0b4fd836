"""Think tags reach every place that generates: training, gap, references; special tokens included."""

import copy
import json
from types import SimpleNamespace

import pytest
from conftest import tiny_model

from rgsd.data.config import DataConfig, DataSplit
from rgsd.evaluation import gap
from rgsd.evaluation.config import EvalConfig, MeasureConfig
from rgsd.evaluation.gap import GapConfig
from rgsd.evaluation.responses import stored_responses
from rgsd.inference import TransformersGenerator
from rgsd.judges import ChecksJudge, JudgeConfig
from rgsd.runs import create_run
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
