"""The examples run unchanged, on the test model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rgsd.data import bundled
from rgsd.judges import JudgeConfig, build_judge

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(code: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.integration
def test_training_from_python():
    script = str(EXAMPLES / "train_from_python.py")
    assert "after 1 steps" in run([script, "--model", "nano", "--steps", "1", "--max_new_tokens", "8"])


@pytest.mark.integration
def test_the_notebook_runs_from_top_to_bottom():
    cells = json.loads((EXAMPLES / "rgsd_in_one_notebook.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert "MODEL =" in code[0]
    code[0] = 'MODEL = "nano"\nSTEPS = 1\nMAX_NEW_TOKENS = 8\n'
    assert "after 1 steps" in run(["-c", "\n".join(code)])


def test_the_custom_judge_is_built_and_leaves_what_it_cannot_decide_unscored(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    judge = build_judge(JudgeConfig(judge="python:custom_judge:build", judge_kwargs={"share": 0.6}))
    example = bundled("medicine").examples[0]
    texts = " ".join(c.text for c in example.rubric)
    assert [v.met for v in judge.judge(example, texts).verdicts] == [True] * len(example.rubric)
    assert not any(v.met for v in judge.judge(example, "Nothing.").verdicts)
    assert judge.name == "overlap (0.6)"
