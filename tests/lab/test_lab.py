"""The lab: its grid, its weak judges, its runs, and the results computed from them."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from rgsd.cli import main
from rgsd.errors import ConfigError, RunError
from rgsd.judges import ChecksJudge, JudgeConfig, build_judge
from rgsd.lab.benches import NanoBench
from rgsd.lab.claims import CLAIMS, Claim, decide, findings
from rgsd.lab.grid import Task, load_arms
from rgsd.lab.measurements import LabResults, Measurement, SeedInterval
from rgsd.lab.running import BASE_ARMS, LabJob, recipe_of, run_lab
from rgsd.lab.weak import WeakJudge
from rgsd.lab.world import World
from rgsd.runs import open_run

pytestmark = pytest.mark.integration

# --- Grid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", load_arms().values(), ids=lambda a: a.name)
def test_every_arm_is_a_recipe_of_its_command(arm, tmp_path):
    recipe = recipe_of(arm.command, LabJob(tmp_path, 3, arm.task, arm).settings())
    assert recipe.training.seed == 3
    assert recipe.data.data.endswith(f"{arm.task.name}.jsonl")


def test_every_claim_is_about_arms_and_measures_that_there_are():
    known = {*load_arms(), *BASE_ARMS}
    assert {c.arm for c in CLAIMS} | {c.other for c in CLAIMS} <= known
    assert {c.measure for c in CLAIMS} <= set(NanoBench.measures)


def test_an_arm_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"all": {"max_steps": 3}, "arms": {"mine": {"command": "train", "beta": 0.3}}}))
    arm = load_arms([path])["mine"]
    assert arm.settings["beta"] == 0.3
    assert arm.settings["max_steps"] == 3
    assert arm.settings["model_name_or_path"] == "nano"
    assert "rgsd" in load_arms([path])


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"arms": {}}, "arms"),
        ({"arms": {"x": {"command": "pray"}}}, "pray"),
        ({"arms": {"a/b": {"command": "train"}}}, "slash"),
        ({"arms": {"x": {"command": "train", "world": {"magic": 1}}}}, "generality, think"),
        ({"arms": {"x": {"command": "train"}}, "sorts": {}}, "sorts"),
        ({"arms": {"x": {"command": "train"}}, "commands": {"dance": {}}}, "dance"),
    ],
)
def test_a_malformed_grid_is_refused(tmp_path, grid, named):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(grid))
    with pytest.raises(ConfigError, match=named):
        load_arms([path])


def test_a_setting_that_the_command_does_not_have_is_refused_before_anything_runs(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"arms": {"x": {"command": "train", "num_generations": 4}}}))
    with pytest.raises(ConfigError, match="num_generations"):
        run_lab(tmp_path / "lab", [load_arms([path])["x"]], [0])
    assert not (tmp_path / "lab").exists()


def test_tasks_have_names_of_their_own():
    tasks = [Task(), Task(think=True), Task(generality=0.5), Task(think=True, generality=0.0)]
    assert [t.name for t in tasks] == ["task", "task-think", "task-0.5", "task-think-0"]


# --- Weak judges ----------------------------------------------------------------------------------------------------


def judged(judge, n=200):
    world = World()
    examples = world.examples("train")[:n]
    tasks = [(e, " ".join(f.sentence for f in world.facts(e.metadata["topic"])[:6])) for e in examples]
    return [v.met for j in judge.judge_all(tasks) for v in j.verdicts], tasks


def test_a_judge_errs_as_often_as_it_is_told_and_always_alike():
    exact, _ = judged(ChecksJudge())
    weak, _ = judged(WeakJudge(errors=0.2))
    wrong = np.mean([a != b for a, b in zip(exact, weak, strict=True)])
    assert 0.16 < wrong < 0.24
    assert weak == judged(WeakJudge(errors=0.2))[0]
    assert weak != judged(WeakJudge(errors=0.2, seed=1))[0]
    assert judged(WeakJudge())[0] == exact


def test_a_lenient_judge_grows_kinder_with_length():
    world, judge, exact = World(), WeakJudge(leniency=0.1), ChecksJudge()
    gained = {}
    for n in (1, 4, 10):
        kind = true = 0
        for example in world.examples("train")[:150]:
            text = " ".join(f.sentence for f in world.facts(example.metadata["topic"])[:n])
            pairs = zip(
                example.rubric, judge.judge(example, text).verdicts, exact.judge(example, text).verdicts, strict=True
            )
            for criterion, lenient, right in pairs:
                good = not criterion.is_pitfall
                if right.met != good:
                    true, kind = true + 1, kind + (lenient.met == good)
                else:
                    assert lenient.met == good
        gained[n] = kind / true
    assert gained[1] == pytest.approx(0.1, abs=0.05)
    assert gained[4] == pytest.approx(1 - 0.9**4, abs=0.07)
    assert gained[10] > gained[4] > gained[1]


def test_a_judge_of_ones_own_is_named_in_a_recipe():
    judge = build_judge(JudgeConfig(judge="python:rgsd.lab.weak:WeakJudge", judge_kwargs='{"errors": 0.25}'))
    assert isinstance(judge, WeakJudge)
    assert judge.errors == 0.25


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge": "python:rgsd.lab.weak"}, "MODULE:FUNCTION"),
        ({"judge": "python:no_such_module:f"}, "cannot be imported"),
        ({"judge": "python:rgsd.lab.weak:Nothing"}, "cannot be imported"),
        ({"judge": "python:rgsd.lab.weak:WeakJudge", "judge_kwargs": {"bribes": 1}}, "bribes"),
        ({"judge": "python:pathlib:Path"}, "without name"),
        ({"judge": "checks", "judge_kwargs": {"errors": 0.1}}, "takes none"),
        ({"judge": "python:a:b", "judge_kwargs": "[1"}, "judge_kwargs must be"),
    ],
)
def test_a_judge_of_ones_own_that_cannot_be_made_is_refused(settings, said):
    if "pathlib" in settings["judge"]:
        said = "without judge"
    with pytest.raises(ConfigError, match=said):
        build_judge(JudgeConfig(**settings))


# --- Claims ---------------------------------------------------------------------------------------------------------


def measurement(arm, seed, mean, n=40, rng=None):
    rng = rng or np.random.default_rng(seed)
    return Measurement(arm, seed, {"satisfaction": mean + 0.05 * rng.standard_normal(n)})


def test_with_seeds_the_interval_is_students_over_their_means():
    runs = [measurement("a", s, m) for s, m in enumerate((0.7, 0.8, 0.9))] + [
        measurement("b", s, 0.5) for s in range(3)
    ]
    found = LabResults(runs).difference("a", "b")
    means = [
        r.values["satisfaction"].mean() - q.values["satisfaction"].mean()
        for r, q in zip(runs[:3], runs[3:], strict=True)
    ]
    half = 4.302652729911275 * np.std(means, ddof=1) / np.sqrt(3)
    assert found.mean == pytest.approx(np.mean(means))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert (found.n_seeds, found.n_prompts) == (3, 120)


def test_with_one_seed_the_interval_is_over_prompts():
    found = LabResults([measurement("a", 0, 0.7), measurement("b", 0, 0.5, rng=np.random.default_rng(9))]).difference(
        "a", "b"
    )
    assert found.n_seeds == 1
    assert found.low < 0.2 < found.high
    assert found.high - found.low < 0.06


def test_arms_are_compared_on_the_seeds_that_both_have():
    results = LabResults([measurement("a", 0, 0.9), measurement("a", 1, 0.1), measurement("b", 0, 0.5)])
    assert results.difference("a", "b").n_seeds == 1
    assert results.difference("a", "b").mean == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("more", 0.01, 0.2, "reproduced"),
        ("more", -0.01, 0.2, "not reproduced"),
        ("more", -0.2, -0.01, "reversed"),
        ("less", -0.2, -0.01, "reproduced"),
        ("less", 0.01, 0.2, "reversed"),
        ("no less", -0.04, 0.2, "reproduced"),
        ("no less", -0.06, 0.2, "not reproduced"),
        ("no less", -0.2, -0.06, "reversed"),
        ("same", -0.04, 0.04, "reproduced"),
        ("same", -0.04, 0.06, "not reproduced"),
        ("same", 0.06, 0.2, "reversed"),
        ("same", -0.2, -0.06, "reversed"),
    ],
)
def test_verdicts_go_by_the_whole_interval(kind, low, high, verdict):
    claim = Claim("", "a", "b", kind=kind, margin=0.05)
    assert decide(claim, SeedInterval((low + high) / 2, low, high, 5, 100)) == verdict
    assert decide(claim, SeedInterval((low + high) / 2, low, high, 1, 29)) == "too few prompts to say"


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A lab with two tiny arms."""
    folder = tmp_path_factory.mktemp("lab")
    grid = folder / "tiny.yaml"
    arms = {
        "tiny": {"command": "train", "max_steps": 2},
        "tiny-sft": {"command": "sft", "max_steps": 2, "max_train_prompts": 16},
    }
    grid.write_text(yaml.safe_dump({"arms": arms}))
    command = [
        "lab",
        "--grid",
        str(grid),
        "--arms",
        "tiny",
        "tiny-sft",
        "--workers",
        "1",
        "--output_dir",
        str(folder / "out"),
    ]
    assert main(command) == 0
    return folder / "out", command


def test_the_page_is_made_of_the_rows(lab):
    folder, _ = lab
    picture = ElementTree.parse(folder / "lab.svg").getroot()
    drawn = "".join(picture.itertext())
    assert all(name in drawn for name in ("base+rubric", "tiny", "tiny-sft"))
    page = (folder / "RESULTS.md").read_text()
    value = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "seed-0" / "tiny" / "samples.jsonl").read_text().splitlines()]
    mean = sum(r["score"] for r in rows) / len(rows)
    assert len(rows) == 288
    assert value["levels"]["tiny"]["satisfaction"]["mean"] == pytest.approx(mean)
    assert f"| tiny | {mean:.3f} |" in page
    assert value["costs"]["tiny"]["rollouts"] == 16
    assert value["costs"]["tiny"]["judge_calls"] == 0
    assert value["costs"]["tiny-sft"]["rollouts"] == 16
    assert value["levels"]["base+rubric"]["satisfaction"]["mean"] > 0.95
    assert "conditioning gap" in page


def test_what_is_finished_is_not_run_again_and_what_is_lost_is(lab):
    folder, command = lab
    before = open_run(folder / "seed-0" / "tiny").meta["started"]
    record = folder / "seed-0" / "tiny-sft" / "run.json"
    record.write_text(record.read_text().replace('"measured"', '"killed"'))
    first = json.loads((folder / "results.json").read_text())["levels"]
    assert main(command) == 0
    assert open_run(folder / "seed-0" / "tiny").meta["started"] == before
    assert open_run(folder / "seed-0" / "tiny-sft").meta["lab_status"] == "measured"
    # The same seed gives the same rows.
    assert json.loads((folder / "results.json").read_text())["levels"] == first


def test_an_arm_with_other_settings_is_not_taken_for_the_one_that_lies_there(lab, capsys):
    _, command = lab
    grid = Path(command[2])
    text = grid.read_text()
    grid.write_text(text.replace("max_steps: 2", "max_steps: 1"))
    assert main(command) == 1
    assert "other settings" in capsys.readouterr().err
    grid.write_text(text)


def test_a_failed_arm_leaves_the_others(lab, tmp_path):
    _, command = lab
    arms = load_arms([command[2]])
    broken = load_arms([command[2]])["tiny-sft"]
    broken.settings["max_completion_length"] = 1
    with pytest.raises(RunError, match="tiny-sft"):
        run_lab(tmp_path / "lab", [arms["tiny"], broken], [0], workers=1)
    assert "max_completion_length" in (tmp_path / "lab" / "seed-0" / "tiny-sft.log").read_text()
    assert open_run(tmp_path / "lab" / "seed-0" / "tiny").meta["lab_status"] == "measured"


def test_unknown_arms_are_named(capsys):
    assert main(["lab", "--arms", "nothing"]) == 1
    assert "rgsd, mismatched" in capsys.readouterr().err


def test_claims_need_both_arms():
    assert [f.claim.arm for f in findings(LabResults([measurement("rgsd", 0, 0.8), measurement("base", 0, 0.2)]))] == [
        "rgsd"
    ]
