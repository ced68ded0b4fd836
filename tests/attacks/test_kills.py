"""Commands other than one-process training, killed at named moments: a second run gives the same result."""

import json
import re
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.killing import make_world, run, timeless
from support.openai_server import OpenAIServer, asked_ids
from support.processes import commands

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SIGNALS = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 0.05}


def places(*found):
    return pytest.mark.parametrize(("place", "nth"), found, ids=[f"{p} {n}" for p, n in found])


def kill_then_repeat(argv, folder, place, nth, number):
    """Kill the command at the place, then run it again to its end."""
    code, text = run(argv, folder, place, nth, number)
    assert code in (-number, 128 + number), (code, text)  # commands that judge catch SIGTERM, and exit by its number
    code, text = run(argv, folder)
    assert code == 0, text


def untimed(value):
    """A table without times, commits and folders."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in timeless(value).items() if k not in ("provenance", "run", "usage")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def table(path):
    return untimed(json.loads(path.read_text()))


def weights(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    assert want
    for name, value in want.items():
        assert torch.equal(got[name], value), name


# --- gap --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gap(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("gap")
    make_world(folder, tokenizer)
    argv = [
        "gap",
        str(folder / "model"),
        "--data",
        str(folder / "data.jsonl"),
        "--max_new_tokens",
        "6",
        "--templates",
        "paper",
    ]
    argv += ["--rollout_tokens", "6", "--divergence_prompts", "2", "--held_out", "4", "--output_dir"]
    code, text = run([*argv, str(folder / "whole")], folder)
    assert code == 0, text
    return argv, folder


@SIGNALS
@places(("evaluation", 2), ("log", 5), ("before a file's rename", 3), ("results", 1))
def test_gap(gap, tmp_path, place, nth, number):
    argv, folder = gap
    kill_then_repeat([*argv, str(tmp_path / "run")], tmp_path, place, nth, number)
    assert table(tmp_path / "run" / "results.json") == table(folder / "whole" / "results.json")


# --- export, audit ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = make_world(folder, tokenizer, **LORA, max_steps=1, save_strategy="no")
    code, text = run(["train", "--config", str(recipe), "--output_dir", str(folder / "run")], folder)
    assert code == 0, text
    code, text = run(["export", str(folder / "run"), "--output_dir", str(folder / "whole")], folder)
    assert code == 0, text
    return folder


@SIGNALS
@places(("model loaded", 1), ("merged", 1), ("weights of an export", 1), ("export written", 1))
def test_export(trained, tmp_path, place, nth, number):
    argv = ["export", str(trained / "run"), "--output_dir", str(tmp_path / "out")]
    code, text = run(argv, tmp_path, place, nth, number)
    assert code == -number, text
    assert not (tmp_path / "out").exists()  # whole or absent
    code, text = run(argv, tmp_path)
    assert code == 0, text
    assert_equal(weights(tmp_path / "out"), weights(trained / "whole"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (trained / "whole").iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "output.txt"}


def answer(request):
    """A judge that finds two claims in each response, the second false, and grants every criterion."""
    system, user = (m["content"] for m in request["messages"])
    if "list the factual claims" in system:
        code = re.search(r"\[response ([^\]]+)\]", user).group(1)
        return json.dumps({"id": code, "claims": ["Water is wet.", "Tea cures all."]})
    verdict = {"verdict": "true"} if "whether claims are true" in system else {"met": True}
    return json.dumps({"verdicts": [{"id": i, "reason": "", **verdict} for i in asked_ids(request)]})


def judged_by(server, folder):
    argv = ["--judge", "j", "--judge_api_base", server.url, "--judge_cache", str(folder / "judge.sqlite")]
    # The small request that tries the judge out is sent anew by each command.
    return [*argv, "--judge_concurrency", "1", "--judge_test_call", "false"]


@SIGNALS
@places(("judge's reply", 2), ("before a file's rename", 1))
def test_audit(trained, tmp_path, place, nth, number):
    (trained / "run" / "audit.json").unlink(missing_ok=True)
    with OpenAIServer(answer) as server:
        argv = ["audit", f"{trained / 'run'}:base", "--audits", "length,claims", *judged_by(server, tmp_path)]
        kill_then_repeat(argv, tmp_path, place, nth, number)
        assert not server.bought_twice()
        got = table(trained / "run" / "audit.json")
        (trained / "run" / "audit.json").unlink()
        fresh = ["audit", f"{trained / 'run'}:base", "--audits", "length,claims", *judged_by(server, trained)]
        code, text = run(fresh, tmp_path)
        assert code == 0, text
        assert got == table(trained / "run" / "audit.json")
    (trained / "judge.sqlite").unlink()


@SIGNALS
@places(("judge's reply", 2), ("before a file's rename", 1))
def test_judge_check(tmp_path, place, nth, number):
    lines = [f"Cough {i}?,Rest {i}.,Advises rest.,{i % 2}" for i in range(6)]
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("\n".join(["prompt,response,criterion,met", *lines]) + "\n")
    with OpenAIServer(answer) as server:
        argv = ["judge", "check", str(labelled), "--modes", "batched", *judged_by(server, tmp_path), "--output"]
        kill_then_repeat([*argv, str(tmp_path / "killed.json")], tmp_path, place, nth, number)
        assert not server.bought_twice()
        code, text = run([*argv, str(tmp_path / "again.json")], tmp_path)
        assert code == 0, text
    assert table(tmp_path / "killed.json")["modes"][0]["judge"] == table(tmp_path / "again.json")["modes"][0]["judge"]
    figures = [
        {k: v for k, v in table(tmp_path / name)["modes"][0].items() if k not in ("cost", "calls", "cached")}
        for name in ("killed.json", "again.json")
    ]
    assert figures[0] == figures[1]


# --- lab --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"arms": {"tiny": {"command": "train", "max_steps": 2}}}))
    argv = ["lab", "--grid", str(folder / "tiny.yaml"), "--arms", "tiny", "--workers", "1", "--output_dir"]
    code, text = run([*argv, str(folder / "whole")], folder)
    assert code == 0, text
    return argv, folder


@places(("task written", 1), ("backward", 2), ("log", 400), ("run noted", 4))
def test_lab(lab, tmp_path, place, nth):
    argv, folder = lab
    kill_then_repeat([*argv, str(tmp_path / "out")], tmp_path, place, nth, signal.SIGKILL)
    levels = [table(f / "results.json")["levels"] for f in (tmp_path / "out", folder / "whole")]
    assert levels[0] == levels[1]
    arm = "seed-0/tiny/adapter" if (folder / "whole/seed-0/tiny/adapter").is_dir() else "seed-0/tiny/model"
    assert_equal(weights(tmp_path / "out" / arm), weights(folder / "whole" / arm))


# --- Two processes ----------------------------------------------------------------------------------------------------


TWO = {"use_peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.3, "evaluate": False}
KILLS = [
    ("rollout", 2, 1, signal.SIGKILL),
    ("backward", 5, 1, signal.SIGKILL),
    ("optimizer", 2, 0, signal.SIGKILL),
    ("before the rename", 2, 0, signal.SIGKILL),
    ("after the rename", 1, 0, signal.SIGKILL),
    ("rollout", 2, 1, signal.SIGTERM),
]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, tokenizer):
    made = {}

    def make(engine):
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine)
            argv = ["train", "--config", str(make_world(folder, tokenizer, **TWO, max_steps=3, save_steps=1))]
            codes, text = commands([*argv, "--output_dir", str(folder / "whole")], folder, engine)
            assert codes == [0, 0], text
            made[engine] = argv, folder
        return made[engine]

    return make


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("place", "nth", "rank", "number"), KILLS, ids=[f"{p} {int(n)}" for p, _, _, n in KILLS])
def test_two_processes(whole_runs, tmp_path, engine, place, nth, rank, number):
    argv, folder = whole_runs(engine)
    again = [*argv, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    codes, text = commands(again, tmp_path, engine, place, nth, number, rank)
    assert codes == [143, 143] if number == signal.SIGTERM else codes[rank] == -number, (codes, text)
    codes, text = commands(again, tmp_path, engine)
    assert codes == [0, 0], text
    assert_equal(weights(tmp_path / "run" / "model"), weights(folder / "whole" / "model"))
    rows = [[timeless(json.loads(x)) for x in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (tmp_path / "run", folder / "whole")]  # fmt: skip
    assert rows[0] == rows[1]
