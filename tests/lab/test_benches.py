"""The lab on a real model: arms that start from arms, both splits, tuning, and intervals over shared prompts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from rgsd.cli import main
from rgsd.errors import ConfigError
from rgsd.lab.benches import BundledBench, NanoBench, bench_of
from rgsd.lab.claims import BUNDLED_CLAIMS, ONE_SEED, Claim, decide
from rgsd.lab.grid import Task, load_grid
from rgsd.lab.measurements import LabResults, Measurement, SeedInterval
from rgsd.lab.nano import model_folder
from rgsd.lab.running import BASE_ARMS, Estimate, LabJob, duration, jobs_of, recipe_of
from rgsd.runs import open_run

GRID = bench_of("embedded-warm")[1]

# --- Grid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", GRID.arms.values(), ids=lambda a: a.name)
def test_every_arm_on_a_real_model_is_a_recipe_of_its_command(arm, tmp_path):
    bench, _ = bench_of("embedded-warm")
    recipe = recipe_of(arm.command, LabJob(tmp_path, 3, arm.task, arm, bench).settings())
    assert recipe.data.data == "bundled"
    start = str(tmp_path / "seed-3" / arm.after) if arm.after else "embedded-warm"
    assert recipe.model.model_name_or_path == start


def test_every_claim_on_a_real_model_is_about_arms_and_measures_that_exist():
    assert {c.arm for c in BUNDLED_CLAIMS} | {c.other for c in BUNDLED_CLAIMS} <= {*GRID.arms, *BASE_ARMS}
    assert {c.measure for c in BUNDLED_CLAIMS} <= set(BundledBench.measures)


def test_rgsd_on_a_real_model_is_the_demo(tmp_path):
    demo = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text())
    demo_only = {"output_dir", "seed", "model_name_or_path", "held_out_tags", "development_tags", "control", "report"}
    demo["max_steps"] = 16  # fewer than the demo's, for GRPO's sake
    arm = GRID.arms["rgsd"].settings
    assert {k: v for k, v in demo.items() if k not in demo_only and arm.get(k) != v} == {}


def test_settings_hold_for_every_arm_that_does_not_set_them_itself(tmp_path):
    path = tmp_path / "scale.yaml"
    path.write_text(yaml.safe_dump({"settings": {"all": {"max_steps": 5}, "grpo": {"learning_rate": 0.5}}}))
    _, grid = bench_of("m", [path], {"warmup_steps": 0, "train.learning_rate": 0.25})
    arms = grid.arms
    assert arms["rgsd"].settings["max_steps"] == 5
    assert arms["rgsd-then-grpo"].settings["max_steps"] == 6
    assert arms["grpo"].settings["learning_rate"] == 0.5
    assert arms["ema"].settings["learning_rate"] == 0.25
    assert {a.settings["warmup_steps"] for a in arms.values()} == {0}
    assert {a.settings["model_name_or_path"] for a in arms.values()} == {"m"}


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"arms": {"x": {"command": "train", "after": "nothing"}}}, "which is no arm"),
        ({"arms": {"x": {"command": "train", "after": "y"}, "y": {"command": "train", "after": "x"}}}, "in a circle"),
        ({"arms": {"x": {"command": "grpo", "after": "think"}}}, "must have the same `world`"),
        ({"settings": {"pray": {}}}, "settings for unknown commands"),
        ({"settings": 1}, "settings of .* must be a mapping"),
        ({"settings": {}, "tune": {}}, "needs a mapping `arms`"),
        ({"arms": {"x": {"command": "train"}}, "tune": {"train": {"learning_rate": [1]}}}, "equally many values"),
        ({"arms": {"x": {"command": "train"}}, "tune": {"train": {"learning_rate": 1}}}, "a list of values"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path, grid, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(grid))
    with pytest.raises(ConfigError, match=said):
        load_grid([path])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--settings", "max_steps"], "must be SETTING=VALUE, got 'max_steps'"),
        (["--settings", "pray.max_steps=1"], "the command must be one of train, grpo, sft, got 'pray'"),
        (["--settings", "max_stops=1"], "max_stops"),
        (["--tune", "true", "--full", "true"], "leave out arms and full"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--model", "embedded-warm", "--grid", "GRID"], "has one task"),
    ],
)
def test_a_lab_that_cannot_be_run_is_refused(tmp_path, capsys, argv, said):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"arms": {"x": {"command": "train", "world": {"think": True}}}}))
    argv = [str(tmp_path / "grid.yaml") if a == "GRID" else a for a in argv]
    assert main(["lab", *argv, "--output_dir", str(tmp_path / "lab")]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()


def test_an_arm_comes_with_the_arms_that_it_starts_from():
    assert [a.name for a in GRID.chosen(["grpo-then-rgsd"], full=False)] == ["grpo-6", "grpo-then-rgsd"]


def test_every_command_has_equally_many_trials():
    trials = GRID.trials()
    assert {len(arms) for arms in trials.values()} == {3}
    rates = [arm.settings["learning_rate"] for arm in trials["grpo"]]
    assert rates == GRID.tune["grpo"]["learning_rate"]
    assert trials["grpo"][0].settings == GRID.arms["grpo"].settings | {"learning_rate": rates[0]}


# --- Data -----------------------------------------------------------------------------------------------------------


def test_the_splits_of_the_bundled_bench_are_not_trained_on():
    from rgsd.data.config import DataConfig, load_split

    bench, _ = bench_of("embedded-warm")
    train = {e.id for e in load_split(DataConfig(**bench.data)).train}
    held_out, development = ({e.id for e in bench.examples(0, Task(), s)} for s in ("held-out", "development"))
    assert (len(held_out), len(development)) == (118, 62)
    assert not held_out & development
    assert not train & (held_out | development)


def test_the_splits_of_the_nano_bench_are_those_of_its_world():
    bench = NanoBench()
    counts = {split: len(bench.examples(1, Task(), split)) for split in ("held-out", "development")}
    assert counts == {"held-out": 288, "development": 96}


# --- Intervals ------------------------------------------------------------------------------------------------------


def results(values_SP, bench):
    return LabResults([Measurement("a", s, {"satisfaction": v}) for s, v in enumerate(values_SP)], bench)


def two_way(rng, n_seeds=3, n_prompts=118, seed_sd=0.05, prompt_sd=0.3, rest_sd=0.2):
    return (
        seed_sd * rng.standard_normal((n_seeds, 1))
        + prompt_sd * rng.standard_normal((1, n_prompts))
        + rest_sd * rng.standard_normal((n_seeds, n_prompts))
    )


@pytest.mark.parametrize("sds", [(0.0, 0.3, 0.2), (0.05, 0.3, 0.2), (0.1, 0.0, 0.2), (0.1, 0.3, 0.0)])
def test_an_interval_over_shared_prompts_covers_seeds_and_prompts(sds):
    """95 % intervals hold the truth in 95 % of labs, whichever of the two makes the noise. (Three seeds.)"""
    rng, bench = np.random.default_rng(0), BundledBench("m")
    hits = 0
    for _ in range(600):
        found = results(two_way(rng, seed_sd=sds[0], prompt_sd=sds[1], rest_sd=sds[2]), bench).mean("a")
        hits += found.low <= 0.0 <= found.high
    assert 0.92 <= hits / 600 <= 0.995


def test_an_interval_over_shared_prompts_matches_the_simple_cases():
    rng, bench = np.random.default_rng(1), BundledBench("m")
    # No noise of the seeds: the interval over prompts, t in place of the bootstrap.
    prompts_P = rng.standard_normal(100)
    found = results(np.stack([prompts_P] * 3), bench).mean("a")
    half = 1.984 * prompts_P.std(ddof=1) / 10
    assert (found.low, found.high) == pytest.approx((prompts_P.mean() - half, prompts_P.mean() + half), abs=1e-3)
    # Noise of the seeds alone: Student's over the seeds.
    seeds_S = np.array([0.1, 0.2, 0.6])
    found = results(np.tile(seeds_S[:, None], 100), bench).mean("a")
    half = 4.3027 * seeds_S.std(ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-3)
    assert (found.n_seeds, found.n_prompts) == (3, 300)


def test_prompts_without_a_value_are_left_out():
    values_SP = np.array([[1.0, np.nan, 0.0, 1.0], [0.0, np.nan, 1.0, 1.0]])
    assert results(values_SP, BundledBench("m")).mean("a").mean == pytest.approx(4 / 6)
    assert np.isnan(results(values_SP[:, 1:2], BundledBench("m")).mean("a").mean)


def test_one_seed_decides_nothing():
    claim = Claim("", "a", "b")
    assert decide(claim, SeedInterval(0.5, 0.4, 0.6, 1, 118)) == ONE_SEED
    assert decide(claim, SeedInterval(0.5, 0.4, 0.6, 2, 236)) == "reproduced"


# --- Time -----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_job_grows_with_its_responses_and_their_length(tmp_path):
    bench, grid = bench_of("embedded-warm")
    jobs = {j.home.name: j for j in jobs_of(tmp_path, grid.arms.values(), [0], bench=bench)}
    estimate = Estimate(list(jobs.values()), {"start": 10, "train": 1.0, "grpo": 0.5, "measure": 0.0})
    assert estimate(jobs["rgsd"]) == 10 + 16 * 12
    assert estimate(jobs["grpo"]) == 10 + 16 * 192 * 0.5
    assert estimate.text([jobs["grpo"]], 2) == "; about 13 min"


def test_the_time_of_a_job_is_what_the_same_arm_took_at_another_seed(tmp_path):
    bench, grid = bench_of("embedded-warm")
    jobs = jobs_of(tmp_path, [grid.arms["rgsd"], grid.arms["ema"]], [0, 1], bench=bench)
    done = next(job for job in jobs if job.home == tmp_path / "seed-0" / "rgsd")
    done.home.mkdir(parents=True)
    (done.home / "config.yaml").write_text("{}")
    record = {"status": "finished", "lab_status": "measured", "lab_splits": ["held-out"], "lab_seconds": 100.0}
    (done.home / "run.json").write_text(json.dumps(record))
    estimate = Estimate(jobs, {"start": 8, "train": 1.0, "measure": 0.0})  # 200 s, twice what it took
    by_place = {job.home.relative_to(tmp_path).as_posix(): job for job in jobs}
    assert estimate(by_place["seed-1/rgsd"]) == 100
    assert estimate(by_place["seed-0/ema"]) == pytest.approx(100)
    assert estimate(by_place["seed-0/base"]) == pytest.approx(4)


def test_both_grids_state_their_time_beforehand(tmp_path):
    for model in ("nano", "embedded-warm"):
        bench, grid = bench_of(model)
        jobs = jobs_of(tmp_path, grid.chosen(None, full=False), [0], bench=bench)
        assert Estimate(jobs, grid.seconds).text(jobs, 2).startswith("; about ")


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A lab on a small model and twelve prompts: RGSD, GRPO, one after the other, and SFT; two seeds."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(model_folder(), folder / "tiny")  # under another name, it is a model like any other
    rows = []
    for i, split in enumerate(["train"] * 6 + ["dev"] * 3 + ["held-out"] * 3):
        checks = [("form", 5, "[a-h]"), ("content", 3, "[i-p]"), ("safety", 2, "[q-z]"), ("pitfall", -4, "[0-9]")]
        rubric = [
            {"criterion": f"Has {r} in week {i}.", "weight": w, "check": {"regex": r}, "tags": [t]}
            for t, w, r in checks
            if (t, i % 2) != ("safety", 1)
        ]
        prompt = f"What helps with a cough in week {i} of {'winter' * (i + 1)}?"
        rows.append({"id": f"r{i}", "prompt": prompt, "rubric": rubric, "tags": [f"split:{split}"]})
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    small = {
        "data": str(folder / "data.jsonl"),
        "near_duplicates": "keep",
        "bf16": False,
        "use_cpu": True,
        "max_steps": 1,
        "max_completion_length": 6,
        "eval_max_new_tokens": 6,
        "lora_r": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
    }
    arms = {
        "sft": {"command": "sft", "drop_leaks": False, "max_completion_length": 60},
        "rgsd-then-grpo": {"command": "grpo", "after": "rgsd", "max_steps": 1},
        "grpo-6": {"command": "grpo", "max_steps": 1},
    }
    settings = {"all": small, "grpo": {"num_generations": 4}}
    (folder / "mini.yaml").write_text(yaml.safe_dump({"settings": settings, "arms": arms}))
    command = [
        *("lab", "--model", str(folder / "tiny"), "--grid", str(folder / "mini.yaml"), "--workers", "1"),
        *("--output_dir", str(folder / "out")),
    ]
    chosen = ["--arms", "rgsd", "rgsd-then-grpo", "grpo-then-rgsd", "--seeds", "0", "1"]
    assert main([*command, *chosen]) == 0
    return folder, command, chosen


@pytest.mark.integration
def test_the_lab_on_a_real_model_writes_its_table(lab):
    folder, _, _ = lab
    value = json.loads((folder / "out" / "results.json").read_text())
    trained = ["rgsd", "rgsd-then-grpo", "grpo-6", "grpo-then-rgsd"]
    assert list(value["levels"]) == ["base", "base+rubric", "base+mismatched", *trained]
    rows = [
        json.loads(line)
        for seed in (0, 1)
        for line in (folder / "out" / f"seed-{seed}" / "rgsd" / "samples.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 6
    level = value["levels"]["rgsd"]
    assert level["satisfaction"]["mean"] == pytest.approx(np.mean([r["score"] for r in rows]))
    form = [v["met"] for r in rows for v in r["verdicts"] if "form" in v["tags"]]
    assert level["form"]["mean"] == pytest.approx(np.mean(form))
    assert {c["verdict"] for c in value["claims"]} == {"too few prompts to say"}
    page = (folder / "out" / "RESULTS.md").read_text()
    assert "| arm | satisfaction | 95 % interval | form | content | safety | pitfalls | tokens |" in page
    # The untrained model is measured once, and counts for both seeds.
    assert not (folder / "out" / "seed-1" / "base").exists()
    assert value["levels"]["base"]["satisfaction"]["n_seeds"] == 2


@pytest.mark.integration
def test_an_arm_that_starts_from_another_has_its_policy_and_its_costs(lab):
    folder, _, _ = lab
    costs = json.loads((folder / "out" / "results.json").read_text())["costs"]
    assert costs["rgsd"]["rollouts"] == 4
    assert costs["grpo-then-rgsd"]["rollouts"] == costs["rgsd-then-grpo"]["rollouts"] == 8
    assert costs["rgsd-then-grpo"]["judge_calls"] == 4
    assert costs["rgsd-then-grpo"]["seconds"] > costs["rgsd"]["seconds"]
    for seed in (0, 1):
        home = folder / "out" / f"seed-{seed}"
        line = open_run(home / "rgsd-then-grpo").meta["lineage"]
        assert [a["id"] for a in line] == [open_run(home / "rgsd").meta["id"]]


@pytest.mark.integration
def test_another_split_is_measured_without_training_again_and_other_settings_are_refused(lab, capsys):
    folder, command, chosen = lab
    home = folder / "out" / "seed-0" / "rgsd"
    started = open_run(home).meta["started"]
    assert main([*command, *chosen, "--split", "development"]) == 0
    assert "Development rubric satisfaction" in capsys.readouterr().out
    assert open_run(home).meta["started"] == started
    assert open_run(home).meta["lab_splits"] == ["development", "held-out"]
    arms = {r["arm"]: r["example_id"] for r in open_run(home).read_lines("samples.jsonl")}
    assert arms == {"trained": "r11", "trained (development)": "r8"}
    assert main([*command, *chosen, "--settings", "learning_rate=0.5"]) == 1
    assert "with other settings" in capsys.readouterr().err
    assert main(["lab", "--output_dir", str(folder / "out")]) == 1
    assert "holds a lab of" in capsys.readouterr().err


@pytest.mark.integration
def test_a_start_that_is_trained_again_brings_its_followers_with_it(lab, capsys):
    folder, command, chosen = lab
    home = folder / "out" / "seed-0"
    before = {name: open_run(home / name).meta["id"] for name in ("rgsd", "rgsd-then-grpo", "grpo-6")}
    record = home / "rgsd" / "run.json"
    record.write_text(record.read_text().replace('"measured"', '"killed"'))
    assert main([*command, *chosen]) == 0
    after = {name: open_run(home / name).meta["id"] for name in before}
    assert {name for name in before if before[name] != after[name]} == {"rgsd", "rgsd-then-grpo"}


@pytest.mark.integration
def test_tuning_looks_at_development_prompts_alone_and_its_file_is_a_grid(lab, capsys):
    folder, command, _ = lab
    command = [a if a != str(folder / "out") else str(folder / "tune") for a in command]
    assert main([*command, "--tune", "true"]) == 0
    assert "To use them: rgsd lab --model" in capsys.readouterr().out
    runs = [open_run(f.parent) for f in (folder / "tune").glob("seed-0/*/run.json")]
    ids = {row["example_id"] for run in runs for row in run.read_lines("samples.jsonl")}
    assert ids == {"r6", "r7", "r8"}
    levels = json.loads((folder / "tune" / "results.json").read_text())["levels"]
    _, grid = bench_of(str(folder / "tiny"), [folder / "mini.yaml", folder / "tune" / "tuned.yaml"])
    for arm in ("rgsd", "grpo", "sft"):
        best = max(levels[name]["satisfaction"]["mean"] for name in levels if name.startswith(f"tune-{arm}-"))
        rate = grid.arms[arm].settings["learning_rate"]
        assert levels[f"tune-{arm}-{rate:g}"]["satisfaction"]["mean"] == best


@pytest.mark.integration
def test_a_follower_of_a_failed_arm_fails_and_the_others_do_not(lab, tmp_path):
    folder, command, chosen = lab
    arms = {"rgsd": {"command": "sft", "max_completion_length": 1}}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({"arms": arms}))
    command = [a if a != str(folder / "out") else str(tmp_path / "out") for a in command]
    at = command.index(str(folder / "mini.yaml"))
    command[at + 1 : at + 1] = [str(tmp_path / "broken.yaml")]
    assert main([*command, *chosen[:-1]]) == 1
    assert open_run(tmp_path / "out" / "seed-0" / "grpo-then-rgsd").meta["lab_status"] == "measured"
    assert not (tmp_path / "out" / "seed-0" / "rgsd-then-grpo" / "run.json").exists()


WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from rgsd.lab.running import _prepare_worker

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare_worker, initargs=(1, os.getpid()))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


@pytest.mark.integration
def test_a_killed_lab_leaves_no_worker_behind(tmp_path):
    """A worker that trained on would hold its run's lock, and the same command could not resume."""
    (tmp_path / "lab.py").write_text(WORKER)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "lab.py")], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    stat = Path(f"/proc/{worker}/stat")
    for _ in range(300):
        # A zombie has ended; nothing here can reap it.
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the lab by 30 seconds")
