"""Comparisons of run folders written here row by row, with scripted judges."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rgsd.cli.compare import main
from rgsd.errors import ConfigError, DataError, JudgeError, RunError, UsageError
from rgsd.evaluation.compare import (
    SecondJudge,
    changes,
    compare,
    compare_runs,
    difference,
    read_arms,
    rejudge,
    second_opinion,
    tally,
    unjudged,
    words,
)
from rgsd.evaluation.run_ref import EvalArm, RunRef
from rgsd.evaluation.samples import Sample
from rgsd.judges import JudgeConfig, Judgement, Usage
from rgsd.rubrics import Criterion, Example, Rubric, Verdict, score

N = 36
WON = N * 2 // 3


class ScriptedJudge:
    """Says met if the response contains the criterion's last word; fails after `limit` judgements."""

    def __init__(self, name="second", limit=None, problem_for=(), invert=False):
        self.name, self.limit, self.problem_for, self.invert = name, limit, set(problem_for), invert
        self.judged = []

    def judge(self, example, response):
        if example.id in self.problem_for:
            return Judgement([Verdict(None, reason="?") for _ in example.rubric], problem="timeout")
        verdicts = [
            Verdict((c.text.split()[-1].strip(".") in response) != self.invert, reason="r") for c in example.rubric
        ]
        return Judgement(verdicts, replies=("raw",), usage=Usage(calls=1, price=0.5))

    def judge_all(self, tasks, done=None):
        found = []
        for i, (example, response) in enumerate(tasks):
            if self.limit is not None and len(self.judged) >= self.limit:
                raise JudgeError("the server is gone")
            found.append(self.judge(example, response))
            self.judged.append(example.id)
            if done is not None:
                done(i, found[-1])
        return found


def by_second(judge):
    """A second judge of `compare_runs`."""
    return SecondJudge(JudgeConfig(), build=lambda config: judge)


def example(i):
    return Example(
        id=f"e{i}",
        messages=({"role": "user", "content": f"What helps with a cough {i}?"},),
        rubric=Rubric(
            (
                Criterion("Advises rest.", 5, tags=("axis:accuracy",)),
                Criterion("Recommends tea.", 3, tags=("axis:completeness",)),
                Criterion("Claims syrup.", -2, tags=("axis:accuracy",)),
            )
        ),
        domain="medicine",
    )


def row_of(one, response, arm="trained", judge="first", met=None):
    """A row as the evaluation writes it; by default with the verdicts of the word judge."""
    verdicts = [
        Verdict(c.text.split()[-1].strip(".") in response if met is None else met[k]) for k, c in enumerate(one.rubric)
    ]
    result = score(one.rubric, verdicts, one.scoring, response)
    return {
        "arm": arm,
        "example_id": one.id,
        "scoring": one.scoring,
        "question": one.messages[-1]["content"],
        "response": f"<think>hm</think>{response}",
        "judged_text": response,
        "n_tokens": len(response.split()),
        "is_truncated": False,
        "score": result.value,
        "coverage": result.coverage,
        "judge": judge,
        "verdicts": [
            {"criterion": c.text, "weight": c.weight, "tags": list(c.tags), "met": v.met, "grade": None, "reason": ""}
            for c, v in zip(one.rubric, verdicts, strict=True)
        ],
    }


def sample_of(one, response, **options):
    """The same as a sample."""
    return Sample.from_row(row_of(one, response, **options))


def write_run(folder, rows, **meta):
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"status": "finished", "commit": "abc", "dirty": False, "held_out_fingerprint": "f1"} | meta
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": str(folder.parent / "data.jsonl"), "seed": 0}))
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def write_data(tmp_path, examples):
    rows = [
        {
            "id": e.id,
            "prompt": e.messages[-1]["content"],
            "domain": "medicine",
            "rubric": [{"criterion": c.text, "weight": c.weight, "tags": list(c.tags)} for c in e.rubric],
        }
        for e in examples
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def world(tmp_path):
    """Run `worse` advises rest, run `better` rest and tea in two prompts of three, at greater and varying length."""
    examples = [example(i) for i in range(N)]
    write_data(tmp_path, examples)
    worse = [row_of(e, "rest now") for e in examples]
    better = [
        row_of(e, "rest and tea" + " indeed" * (i % 4) if i % 3 else "rest" + " again" * (i % 4))
        for i, e in enumerate(examples)
    ]
    base = [row_of(e, "nothing", arm="base") for e in examples]
    return write_run(tmp_path / "worse", base + worse), write_run(tmp_path / "better", better), examples


def table_of(*names, **options):
    return compare(arms_of(*names), **options)


def arms_of(*names, **options):
    return read_arms([RunRef.parse(name) for name in names], **options)


# What is compared.


def test_what_won_and_by_how_much(world):
    worse, better, _ = world
    table = table_of(worse, better)
    json.dumps(table, allow_nan=False)
    assert table["n_shared_prompts"] == N
    assert [r["arm"] for r in table["runs"]] == ["trained", "trained"]
    assert table["runs"][0]["summary"]["score"]["mean"] == pytest.approx(5 / 8)
    assert table["runs"][0]["provenance"]["commit"] == "abc"
    found = table["differences"][0]
    assert found["difference"]["mean"] == pytest.approx(2 / 3 * 3 / 8)
    assert found["difference"]["low"] > 0
    assert (found["criteria"]["won"], found["criteria"]["lost"], found["criteria"]["n"]) == (WON, 0, 3 * N)
    assert found["criteria"]["p"] == pytest.approx(2 * 0.5**WON)
    tags = {g["group"]: g for g in found["criteria_by_tag"]}
    assert (tags["axis:completeness"]["net"], tags["axis:accuracy"]["net"]) == (WON, 0)
    assert tags["axis:completeness"]["p_holm"] == pytest.approx(2 * tags["axis:completeness"]["p"])
    assert found["criteria_by_text"][0]["group"] == "Recommends tea."
    assert found["prompts"]["won"] == WON
    assert found["prompts"]["tied"] == N - WON
    assert found["prompts"]["most_won"][0]["won"] == ["Recommends tea."]
    assert len(found["prompts"]["most_won"]) == 5
    assert found["prompts"]["most_lost"] == []
    said = "\n".join(table["sentences"])
    assert "better is better than worse: +25.0 points" in said
    assert found["conclusion"] == "better"


def test_the_other_way_round_it_lost(world):
    worse, better, _ = world
    found = table_of(better, worse)["differences"][0]
    assert found["difference"]["high"] < 0
    assert (found["criteria"]["won"], found["criteria"]["lost"]) == (0, WON)
    assert [p["lost"] for p in found["prompts"]["most_lost"]] == [["Recommends tea."]] * 5
    assert "is worse than" in "\n".join(table_of(better, worse)["sentences"])


def test_no_difference_is_called_none(world):
    worse, _, _ = world
    table = table_of(worse, f"{worse}:base")
    same = table_of(f"{worse}:base", f"{worse}:trained")
    assert table["differences"][0]["difference"]["mean"] == -same["differences"][0]["difference"]["mean"]
    rows = [sample_of(example(i), "rest") for i in range(12)]
    mixed = [sample_of(example(i), "tea" if i % 2 else "rest tea") for i in range(12)]
    found = difference(rows, mixed)["difference"]
    assert found["low"] < 0 < found["high"]


def test_a_pitfall_is_won_when_it_is_no_longer_met():
    a = [sample_of(example(0), "syrup"), sample_of(example(1), "rest")]
    b = [sample_of(example(0), "rest"), sample_of(example(1), "rest syrup")]
    found = {(c.prompt, c.text): c.outcome for c in changes(a, b)}
    assert found[("e0", "Claims syrup.")] == 1
    assert found[("e0", "Advises rest.")] == 1
    assert found[("e1", "Claims syrup.")] == -1
    assert found[("e1", "Recommends tea.")] == 0


def test_a_criterion_that_changed_its_sign_is_not_the_same():
    a, b = [sample_of(example(0), "rest syrup")], [sample_of(example(0), "rest")]
    verdicts = (*b[0].verdicts[:2], replace(b[0].verdicts[2], weight=2))
    b[0] = replace(b[0], verdicts=verdicts)
    assert {c.text for c in changes(a, b)} == {"Advises rest.", "Recommends tea."}


def test_unscored_criteria_are_neither_won_nor_lost():
    a = [sample_of(example(0), "", met=[True, None, False])]
    b = [sample_of(example(0), "", met=[False, True, None])]
    assert [(c.text, c.outcome) for c in changes(a, b)] == [("Advises rest.", -1)]


def test_the_sign_test_counts_prompts_not_criteria():
    # Three criteria won in each of two prompts are two observations, not six.
    a = [sample_of(example(i), "syrup") for i in range(2)]
    b = [sample_of(example(i), "rest tea") for i in range(2)]
    found = tally(changes(a, b))
    assert (found["won"], found["lost"]) == (6, 0)
    assert found["p"] == 0.5


def test_a_criterion_that_stands_twice_is_matched_in_order():
    def twice(met):
        one = Example("x", example(0).messages, Rubric((Criterion("Same."), Criterion("Same."))))
        return sample_of(one, "", met=met)

    assert [c.outcome for c in changes([twice([True, False])], [twice([True, True])])] == [0, 1]


def test_length_can_account_for_a_gain():
    # The gain follows the length exactly: nothing is left at equal length.
    examples = [example(i) for i in range(40)]
    a = [replace(sample_of(e, "x" * 64), score=0.2) for e in examples]
    b = [sample_of(e, "x" * (64 + 16 * (i % 5))) for i, e in enumerate(examples)]
    b = [replace(s, score=0.2 + 0.3 * math.log2(len(s.judged_text) / 64)) for s in b]
    found = difference(a, b)
    assert found["difference"]["low"] > 0
    controlled = found["length"]["controlled"]
    assert controlled["difference"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert controlled["slope"]["value"] == pytest.approx(0.3)
    assert found["length"]["characters"]["value"] == pytest.approx(1.5)
    assert any("may account" in s for s in words._length_sentences({**found, "run": "b", "against": "a"}))


# What cannot be compared.


def test_runs_without_a_common_prompt_are_refused(world, tmp_path):
    worse, _, _ = world
    other = write_run(
        tmp_path / "other", [row_of(example(i), "rest") for i in range(90, 95)], held_out_fingerprint="f2"
    )
    with pytest.raises(RunError, match=r"share no prompt: worse has 36 \(held-out fingerprint f1\), other has 5 .*f2"):
        table_of(worse, other)


def test_the_same_id_with_another_text_is_another_prompt(world, tmp_path):
    worse, _, _ = world
    rows = [row_of(example(i), "rest") | ({"question": "Else?"} if i < 4 else {}) for i in range(N)]
    other = write_run(tmp_path / "other", rows)
    table = table_of(worse, other)
    assert table["n_shared_prompts"] == N - 4
    assert "4 prompts have the same id but different texts" in table["warnings"][0]
    all_other = write_run(tmp_path / "all", [r | {"question": "Else?"} for r in rows])
    with pytest.raises(RunError, match="36 ids are the same, but their texts differ"):
        table_of(worse, all_other)


def test_prompts_that_not_all_have_are_left_out_and_counted(world, tmp_path):
    worse, better, _ = world
    short = write_run(tmp_path / "short", [row_of(example(i), "tea") for i in range(10)], held_out_fingerprint="f2")
    table = table_of(worse, better, short)
    assert table["n_shared_prompts"] == 10
    assert [r["summary"]["n_prompts"] for r in table["runs"]] == [10, 10, 10]
    said = " ".join(table["warnings"])
    assert "held-out data differ" in said
    assert "worse: 26 of its 36 prompts are not in every run" in said


def test_differing_rubrics_are_told_and_only_common_criteria_counted(world, tmp_path):
    worse, _, examples = world
    rows = [row_of(e, "rest tea") for e in examples]
    rows[0]["verdicts"][1]["criterion"] = "Recommends hot tea."
    other = write_run(tmp_path / "other", rows)
    table = table_of(worse, other)
    assert "rubrics of 1 of 36" in table["warnings"][0]
    assert table["differences"][0]["criteria"]["n"] == 3 * N - 1


def test_different_scorings_are_refused(world, tmp_path):
    worse, _, examples = world
    other = write_run(tmp_path / "other", [row_of(e, "rest") | {"scoring": "prbench"} for e in examples])
    with pytest.raises(RunError, match=r"scored in different ways .*satisfaction.*prbench"):
        table_of(worse, other)


def test_rows_of_different_judges_are_never_compared(world, tmp_path):
    worse, _, examples = world
    other = write_run(tmp_path / "other", [row_of(e, "tea", judge="lenient") for e in examples])
    with pytest.raises(RunError, match=r"worse was judged by 'first'; other was judged by 'lenient'.*--judge"):
        table_of(worse, other)
    with pytest.raises(RunError, match="'nobody' did not judge all"):
        table_of(worse, world[1], by="nobody")


def test_low_coverage_is_told(world, tmp_path):
    worse, _, examples = world
    rows = [row_of(e, "rest", met=[True, None, False]) for e in examples]
    assert "only 66.7 % of the criteria" in table_of(worse, write_run(tmp_path / "o", rows))["warnings"][0]


def test_runs_and_arms_are_named(world, tmp_path):
    worse, better, _ = world
    found = arms_of(f"{worse}:base", better)
    assert [a.name for a in found] == ["base", "trained"]
    assert [a.label for a in found] == ["worse", "better"]
    assert [a.label for a in arms_of(worse, f"{worse}:base")] == ["worse:trained", "worse:base"]
    with pytest.raises(RunError, match="no arm 'bse', its arms are base, trained"):
        arms_of(f"{worse}:bse", better)
    with pytest.raises(RunError, match="twice"):
        arms_of(worse, f"{worse}:trained")
    with pytest.raises(RunError, match="at least two"):
        arms_of(worse)
    with pytest.raises(RunError, match="not a run folder"):
        arms_of(worse, str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="no judged responses"):
        arms_of(worse, write_run(tmp_path / "empty", []))
    two = write_run(tmp_path / "two", [row_of(example(0), "x", arm=a) for a in ("m1", "m2")])
    with pytest.raises(RunError, match="2 arms, none of them a trained policy"):
        arms_of(worse, two)
    colon = write_run(tmp_path / "with:colon", [row_of(example(0), "x", arm="demo:trained")])
    assert arms_of(worse, f"{colon}:demo:trained")[1].name == "demo:trained"


def test_later_rows_count(world, tmp_path):
    worse, _, examples = world
    rows = [row_of(e, "nothing") for e in examples] + [row_of(e, "rest tea") for e in examples]
    table = table_of(worse, write_run(tmp_path / "again", rows))
    assert table["runs"][1]["summary"]["score"]["mean"] == 1.0


@pytest.mark.parametrize("n", [2, 29])
def test_few_prompts_get_no_verdict(tmp_path, n):
    examples = [example(i) for i in range(n)]
    write_data(tmp_path, examples)
    worse = write_run(tmp_path / "worse", [row_of(e, "nothing") for e in examples])
    better = write_run(tmp_path / "better", [row_of(e, "rest tea") for e in examples])
    table = compare_runs([worse, better], second=by_second(ScriptedJudge()))
    found = table["differences"][0]
    assert found["difference"]["low"] > 0
    assert found["conclusion"] == "too few prompts to say"
    said = "\n".join(table["sentences"])
    assert "is better than" not in said
    assert said.count("too few prompts to say") == 4  # under either judge, of tags and of the ranking


# The second judge.


def test_a_second_judge_that_agrees_keeps_the_ranking(world, tmp_path):
    worse, better, _ = world
    judge = ScriptedJudge()
    table = compare_runs([worse, better], second=by_second(judge))
    second = table["second_judges"][0]
    assert len(judge.judged) == 2 * N
    assert second["agreement"]["raw"]["value"] == 1.0
    assert second["agreement"]["kappa"]["value"] == 1.0
    assert second["agreement"]["n"] == 2 * 3 * N
    assert second["agreement"]["n_prompts"] == N
    assert second["is_ranking_kept"] is True
    assert second["rankings"]["second"] == ["better", "worse"]
    assert second["differences"][0]["conclusion_second"] == "better"
    assert second["usage"]["price"] == N  # 0.5 a response of two runs
    assert "The ranking survives it: better > worse" in "\n".join(table["sentences"])

    # Its rows are in the runs: nothing is judged twice, and a plain comparison finds them.
    again = ScriptedJudge()
    compare_runs([worse, better], second=by_second(again))
    assert again.judged == []
    assert [s["judge"] for s in table_of(worse, better)["second_judges"]] == ["second"]
    kept = [json.loads(line) for line in (Path(better) / "samples.jsonl").read_text().splitlines()]
    new = [r for r in kept if r["judge"] == "second"]
    assert len(new) == N
    assert new[1]["response"] == "<think>hm</think>rest and tea indeed"
    assert new[1]["replies"] == ["raw"]
    assert new[1]["verdicts"][0]["tags"] == ["axis:accuracy"]
    assert json.loads((Path(better) / "run.json").read_text())["status"] == "finished"


def test_few_prompts_give_no_verdict_on_tags_or_rankings(tmp_path):
    examples = [example(i) for i in range(29)]
    write_data(tmp_path, examples)
    worse = write_run(tmp_path / "worse", [row_of(e, "rest") for e in examples])
    better = write_run(tmp_path / "better", [row_of(e, "rest and tea") for e in examples])
    table = compare_runs([worse, better], second=by_second(ScriptedJudge()))
    said = "\n".join(table["sentences"])
    assert any(g["p_holm"] < 0.05 for d in table["differences"] for g in d["criteria_by_tag"])
    for verdict in ("significant", "survive", "is better", "under both judges"):
        assert verdict not in said
    assert "too few prompts to say whether in any tag by more than chance" in said
    assert "ranks them better > worse (29 prompts): too few prompts to say if that holds" in said


def test_a_second_judge_that_says_the_opposite_turns_the_ranking(world):
    worse, better, _ = world
    table = compare_runs([worse, better], second=by_second(ScriptedJudge(invert=True)))
    second = table["second_judges"][0]
    assert second["agreement"]["raw"]["value"] == 0.0
    assert second["agreement"]["kappa"]["value"] < 0
    assert second["is_ranking_kept"] is False
    assert second["differences"][0]["is_sign_kept"] is False
    said = "\n".join(table["sentences"])
    assert "does not survive" in said
    assert "worse under it, better under first" in said


def test_agreement_is_counted_by_hand():
    ids = [f"e{i}" for i in range(2)]
    first = {
        "e0": sample_of(example(0), "t", met=[True, True, False]),
        "e1": sample_of(example(1), "t", met=[False, None, True]),
    }
    other = {
        "e0": sample_of(example(0), "t", met=[True, False, False]),
        "e1": sample_of(example(1), "t", met=[True, True, True]),
    }
    arms = [EvalArm(None, "a", {"j1": first, "j2": other}, label=f"c{k}") for k in range(2)]
    found = second_opinion(arms, "j1", "j2", ids)
    a = found["agreement_by_run"]["c0"]
    assert (a["both_met"], a["reference_only"], a["other_only"], a["neither_met"]) == (2, 1, 1, 1)
    assert a["n"] == 5
    assert found["agreement"]["n"] == 10
    assert found["met_share"] == {"first": 0.6, "second": 0.6}


def test_rows_about_another_response_are_left_out(world, tmp_path):
    worse, _, examples = world
    rows = [row_of(e, "rest tea") for e in examples]
    second = [row_of(e, "rest tea" if i else "other", judge="second") for i, e in enumerate(examples)]
    also = [row_of(e, "rest now", judge="second") for e in examples]
    with open(f"{worse}/samples.jsonl", "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in also)
    table = table_of(worse, write_run(tmp_path / "other", rows + second))
    found = table["second_judges"][0]
    assert found["n_other_response"] == 1
    assert found["n_prompts"] == N - 1


def test_a_judge_that_dies_goes_on_where_it_was(world):
    worse, better, _ = world
    with pytest.raises(JudgeError, match="gone"):
        compare_runs([worse, better], second=by_second(ScriptedJudge(limit=N + 5)))
    rest = ScriptedJudge()
    table = compare_runs([worse, better], second=by_second(rest))
    assert rest.judged == [f"e{i}" for i in range(5, N)]
    assert table["second_judges"][0]["n_prompts"] == N


def test_what_a_second_judge_left_unscored_is_asked_again(world):
    worse, better, _ = world
    table = compare_runs([worse, better], second=by_second(ScriptedJudge(problem_for=["e3"])))
    assert table["second_judges"][0]["n_prompts"] == N - 1
    again = ScriptedJudge()
    table = compare_runs([worse, better], second=by_second(again))
    assert again.judged == ["e3", "e3"]
    assert table["second_judges"][0]["n_prompts"] == N


def test_runs_of_different_judges_are_compared_by_one_that_judges_both(world, tmp_path):
    worse, _, examples = world
    other = write_run(tmp_path / "other", [row_of(e, "rest tea", judge="lenient") for e in examples])
    with pytest.raises(JudgeError):
        compare_runs([worse, other], second=by_second(ScriptedJudge(limit=N + 5)))
    judge = ScriptedJudge()
    table = compare_runs([worse, other], second=by_second(judge))
    assert len(judge.judged) == N - 5
    assert table["judge"] == "second"
    assert table["second_judges"] == []


def test_a_judge_that_came_first_in_one_run_can_be_the_second(world, tmp_path):
    worse, _, examples = world
    rows = [row_of(e, "rest tea", judge=judge) for judge in ("second", "first") for e in examples]
    other = write_run(tmp_path / "other", rows)
    assert {s.judge for s in unjudged(arms_of(worse, other)[1], "third")} == {"second"}
    judge = ScriptedJudge()
    table = compare_runs([worse, other], second=by_second(judge))
    assert len(judge.judged) == N
    assert table["judge"] == "first"
    assert [s["judge"] for s in table["second_judges"]] == ["second"]


def test_the_judge_that_is_compared_by_is_no_second_opinion(world):
    worse, better, _ = world
    with pytest.raises(ConfigError, match="name another"):
        compare_runs([worse, better], second=by_second(ScriptedJudge("first")))
    with pytest.raises(RunError, match="'first' for both"):
        table_of(worse, better, judge2=["first"])
    with pytest.raises(RunError, match="'nobody' did not judge"):
        table_of(worse, better, judge2=["nobody"])


def test_judging_again_needs_the_runs_own_examples(world):
    _, _, examples = world
    own = [sample_of(e, "rest") for e in examples]
    by_id = {e.id: e for e in examples}
    changed = Example("e0", by_id["e0"].messages, Rubric((Criterion("Else."),)))
    judge = ScriptedJudge()
    with pytest.raises(DataError, match="'e0' has another prompt or rubric"):
        rejudge(own, by_id | {"e0": changed}, judge)
    with pytest.raises(DataError, match="'e0' is not among"):
        rejudge(own, {}, judge)
    assert judge.judged == []
    found = rejudge(own, by_id, judge)
    assert [s.example_id for s in found] == [s.example_id for s in own]
    assert found[0].score == pytest.approx(5 / 8)


# The command.


def test_the_command_prints_and_writes(world, tmp_path, capsys):
    worse, better, _ = world
    out = tmp_path / "deep" / "table.json"
    assert main([worse, better, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "better is better than worse" in printed
    assert "Recommends tea." in printed
    table = json.loads(out.read_text())
    assert table["command"].startswith("rgsd compare ")
    assert table["differences"][0]["run"] == "better"


def test_the_command_refuses_settings_of_a_judge_that_it_has_not(world):
    worse, better, _ = world
    with pytest.raises(UsageError, match="--judge_mode"):
        main([worse, better, "--judge_mode", "batched"])
