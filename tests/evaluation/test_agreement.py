"""A scripted judge against human verdicts in every supported format."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.openai_server import OpenAIServer, asked_ids

from rgsd.cli.judge import main
from rgsd.errors import ConfigError, DataError, JudgeError, JudgeUnreachable, UsageError
from rgsd.evaluation import agreement as module
from rgsd.evaluation.agreement import check, check_file, sampled
from rgsd.evaluation.agreement_words import show
from rgsd.judges import JudgeConfig, Judgement, Usage
from rgsd.judges.labelled import Labelled, LabelledSet, group, read_labelled
from rgsd.rubrics import Verdict

PROMPT = ({"role": "user", "content": "What helps with a cough?"},)


class ScriptedJudge:
    """A judge whose verdicts come from a function of response and criterion."""

    def __init__(self, decide, name="scripted", problem="timeout"):
        self.decide, self.name, self.problem, self.tasks = decide, name, problem, []

    def judge(self, example, response):
        met = [self.decide(response, c.text) for c in example.rubric]
        usage = Usage(calls=1, price=0.01)
        return Judgement([Verdict(m) for m in met], usage=usage, problem=self.problem if None in met else "")

    def judge_all(self, tasks, done=None):
        self.tasks += tasks
        found = [self.judge(*task) for task in tasks]
        for i, judgement in enumerate(found):
            if done is not None:
                done(i, judgement)
        return found


def item(prompt, response, criterion, *labels, weight=None, category=None, tags=()):
    messages = ({"role": "user", "content": prompt},)
    return Labelled(messages, response, criterion, labels, ("",) * len(labels), weight, category, tags)


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def meta_row(**more):
    """A row of HealthBench's meta-evaluation, with its field names."""
    return {
        "anonymized_physician_ids": ["p1", "p2"],
        "binary_labels": [True, False],
        "canary": "c",
        "category": "cluster:hedging",
        "completion": "Rest.",
        "completion_id": "c1",
        "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *PROMPT],
        "prompt_id": "q1",
        "rubric": "Advises rest.",
    } | more


# Reading.


def test_healthbenchs_meta_evaluation_is_read(tmp_path):
    rows = [
        meta_row(),
        meta_row(rubric="Hedges.", binary_labels=[True, True, False], anonymized_physician_ids=["a", "b", "c"]),
    ]
    found = read_labelled(write(tmp_path / "meta.jsonl", rows))
    assert found.form == "healthbench_meta"
    first, second = found.items
    assert (first.response, first.criterion, first.labels) == ("Rest.", "Advises rest.", (True, False))
    assert first.raters == ("p1", "p2")
    assert first.category == "cluster:hedging"
    assert len(first.messages) == 3
    assert first.majority is None
    assert second.majority is True
    assert second.sign == "unstated"


def test_a_users_csv_is_read(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffid,Prompt,response,criterion,met,weight,category,tags\n"
        '1,Cough?,"Rest,\nand tea.",Advises rest.,YES,5,medicine,"axis:a, axis:b"\n'
        "2,Cough?,,Advises rest.,0,-3,,\n",
        encoding="utf-8",
    )
    found = read_labelled(path)
    assert found.form == "table"
    first, second = found.items
    assert first.response == "Rest,\nand tea."
    assert (first.labels, first.weight, first.category, first.tags) == ((True,), 5.0, "medicine", ("axis:a", "axis:b"))
    assert (second.response, second.labels, second.sign, second.category) == ("", (False,), "pitfall", None)
    assert first.prompt_key == second.prompt_key
    assert (first.where, second.where) == ("mine.csv, line 2", "mine.csv, line 4")


def test_semicolons_long_responses_and_conversations_in_a_csv(tmp_path):
    path = tmp_path / "mine.csv"
    talk = json.dumps([{"role": "system", "content": "Be kind"}, *PROMPT]).replace('"', '""')
    path.write_text(f'prompt;response;criterion;met\n"{talk}";{"x" * 200_000};Advises rest.;no\n')
    found = read_labelled(path).items[0]
    assert len(found.response) == 200_000
    assert [m["role"] for m in found.messages] == ["system", "user"]


def test_several_peoples_rows_are_one_item(tmp_path):
    rows = [
        {"prompt": "Cough?", "response": "Rest.", "criterion": "Advises rest.", "met": met, "rater": rater}
        for met, rater in ((True, "a"), ("false", "b"), (1, "c"))
    ]
    found = read_labelled(write(tmp_path / "mine.jsonl", rows)).items
    assert len(found) == 1
    assert found[0].labels == (True, False, True)
    assert found[0].raters == ("a", "b", "c")
    assert found[0].majority is True


def samples_row(verdicts, **more):
    return {
        "arm": "trained",
        "example_id": "e",
        "question": "Cough?",
        "response": "<think>x</think>Rest.",
        "judged_text": "Rest.",
        "judge": "j",
        "domain": "medicine",
        "verdicts": verdicts,
    } | more


def test_a_runs_rows_with_human_verdicts_are_read(tmp_path):
    verdicts = [
        {"criterion": "Advises rest.", "weight": 5, "tags": ["t"], "met": False, "human": True},
        {"criterion": "Claims syrup.", "weight": -2, "tags": [], "met": True, "human": [False, False, True]},
        {"criterion": "Is kind.", "weight": 1, "tags": [], "met": True, "human": None},
    ]
    found = read_labelled(write(tmp_path / "samples.jsonl", [samples_row(verdicts)]))
    assert found.form == "samples"
    assert found.n_without_label == 1
    assert [(i.criterion, i.labels, i.sign) for i in found.items] == [
        ("Advises rest.", (True,), "positive"),
        ("Claims syrup.", (False, False, True), "pitfall"),
    ]
    assert found.items[0].response == "Rest."
    assert found.items[0].tags == ("t",)


def test_rows_of_human_judges_are_peoples_verdicts(tmp_path):
    def verdicts(met):
        return [{"criterion": "Advises rest.", "weight": 5, "tags": [], "met": met}]

    rows = [samples_row(verdicts(True), judge="human:1"), samples_row(verdicts(False), judge="human:2")]
    found = read_labelled(write(tmp_path / "samples.jsonl", rows)).items
    assert len(found) == 1
    assert found[0].labels == (True, False)
    assert found[0].raters == ("human:1", "human:2")


def test_rows_without_a_human_are_refused_with_the_remedy(tmp_path):
    row = samples_row([{"criterion": "Advises rest.", "weight": 5, "tags": [], "met": True}])
    with pytest.raises(DataError, match='"human"'):
        read_labelled(write(tmp_path / "samples.jsonl", [row]))


GOOD = {"prompt": "Cough?", "response": "Rest.", "criterion": "Advises rest.", "met": True}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (GOOD | {"met": "maybe"}, r"met: .*'maybe'"),
        (GOOD | {"met": None}, "met: "),
        (GOOD | {"met": 2}, r"met: .*got 2"),
        (GOOD | {"weight": 0}, r"weight: .*got 0"),
        (GOOD | {"weight": float("nan")}, "NaN"),
        (GOOD | {"weight": 10**400}, "400 digits"),
        (GOOD | {"weight": 10**399}, r"weight: .*1000"),
        (GOOD | {"weight": "1e308"}, r"weight: .*'1e308'"),
        (GOOD | {"tags": 5}, r"tags: .*got 5"),
        (GOOD | {"tags": [["a"]]}, "tags: "),
        ('{"prompt": "p", "response": "r", "criterion": "c", "met": false, "met": true}', "'met'"),
        ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "deeper"),
        (GOOD | {"weight": "much"}, r"weight: .*'much'"),
        (GOOD | {"criterion": " "}, "criterion: "),
        (GOOD | {"response": None}, "response: "),
        (GOOD | {"prompt": []}, "prompt: "),
        (GOOD | {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "'assistant'"),
        (GOOD | {"prompt": [{"role": "robot", "content": "a"}]}, r"prompt: .*'?role"),
        ([1, 2], r"\[1, 2\]"),
        (GOOD | {"weight": -1}, r"None as in mine\.jsonl, line 1"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, bad, named):
    with pytest.raises(DataError, match=rf"(?s)1 row of mine\.jsonl.*mine\.jsonl, line 2: .*{named}"):
        read_labelled(write(tmp_path / "mine.jsonl", [GOOD, bad]))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (meta_row(binary_labels=[]), "binary_labels: "),
        (meta_row(binary_labels=[True, "no"]), "binary_labels: "),
        (meta_row(anonymized_physician_ids=["one"]), "one for each of 2"),
        (meta_row(completion=None), "completion: "),
    ],
)
def test_a_bad_row_of_the_meta_evaluation(tmp_path, bad, named):
    with pytest.raises(DataError, match=named):
        read_labelled(write(tmp_path / "meta.jsonl", [meta_row(), bad]))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv"):
        read_labelled(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="suffix"):
        read_labelled(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("prompt,response,criteron,met\na,b,c,1\n")
    with pytest.raises(DataError, match="Did you mean 'criteron' for 'criterion'"):
        read_labelled(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("prompt,response,criterion,met\na,b,c,1,2\na,b,d,x\n")
    with pytest.raises(DataError, match=r"(?s)2 rows.*line 2: .*1 more.*line 3: met"):
        read_labelled(tmp_path / "b.csv")
    (tmp_path / "g.csv").write_text("prompt,response,criterion,met\na,b,c,\n")
    with pytest.raises(DataError, match=r"g\.csv, line 2: met: "):
        read_labelled(tmp_path / "g.csv")
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError, match=r"c\.jsonl"):
        read_labelled(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"prompt"\n')
    with pytest.raises(DataError, match=r"line 1: .*JSON"):
        read_labelled(tmp_path / "d.jsonl")
    (tmp_path / "e.csv").write_bytes(b"prompt,response,criterion,met\n\xff,b,c,1\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_labelled(tmp_path / "e.csv")
    write(tmp_path / "f.jsonl", [GOOD | {"met": "?", "criterion": f"c{i}"} for i in range(9)])
    with pytest.raises(DataError, match="and 4 more"):
        read_labelled(tmp_path / "f.jsonl")


# Asking.


def test_the_labelled_criteria_of_a_response_are_asked_together():
    items = [
        item("a", "r1", "c1", True),
        item("a", "r2", "c1", True),
        item("a", "r1", "c2", False),
        item("b", "r1", "c1", True),
    ]
    found = group(items)
    assert [(g.response, [c.text for c in g.example.rubric], g.positions) for g in found] == [
        ("r1", ["c1", "c2"], (0, 2)),
        ("r2", ["c1"], (1,)),
        ("r1", ["c1"], (3,)),
    ]
    assert len({g.example.id for g in found}) == 3


def test_a_sample_of_prompts_is_drawn_by_the_seed():
    items = tuple(item(f"p{i // 2}", "r", f"c{i}", True) for i in range(40))
    one, same, other = (sampled(LabelledSet(items, "table"), 5, seed).items for seed in (0, 0, 1))
    assert one == same != other
    assert len(one) == 10
    assert sampled(LabelledSet(items, "table"), None, 0).items == items


# Comparing.


def labelled_and_judge():
    """Twenty prompts with a positive criterion and a pitfall each; the judge errs on every fifth and on half."""
    items, said = [], {}
    for i in range(20):
        for kind, weight, wrong in (("good", 2.0, i % 5 == 0), ("pitfall", -1.0, i % 2 == 0)):
            truth = i % 4 < 2
            items.append(item(f"p{i}", "r", f"{kind} {i}", truth, weight=weight, category=kind, tags=(f"t:{kind}",)))
            said[f"{kind} {i}"] = truth != wrong
    return LabelledSet(tuple(items), "table"), lambda response, criterion: said[criterion]


def test_agreement_and_error_rates_by_sign():
    labelled, decide = labelled_and_judge()
    table = check(labelled, {"batched": ScriptedJudge(decide)})
    json.dumps(table, allow_nan=False)
    mode = table["modes"][0]
    assert mode["agreement"]["raw"]["value"] == pytest.approx(1 - 14 / 40)
    assert mode["agreement"]["n_prompts"] == 20
    assert mode["by_category"]["good"]["raw"]["value"] == pytest.approx(0.8)
    assert mode["by_tag"]["t:pitfall"]["raw"]["value"] == pytest.approx(0.5)
    rates = mode["error_rates"]
    # i = 0, 5, 10, 15 are judged wrongly; people say met in 0 and 5 (0 % 4, 5 % 4 < 2), not in 10 and 15.
    assert rates["positive"]["false_negative"]["value"] == pytest.approx(2 / 10)
    assert rates["positive"]["false_positive"]["value"] == pytest.approx(2 / 10)
    # Even i: met in 0, 4, 8, 12, 16 and not in 2, 6, 10, 14, 18.
    assert rates["pitfall"]["false_negative"]["value"] == pytest.approx(5 / 10)
    assert rates["pitfall"]["false_positive"]["value"] == pytest.approx(5 / 10)
    assert rates["unstated"]["false_positive"]["value"] is None
    assert rates["all"]["n_met"] == rates["all"]["n_not_met"] == 20
    assert mode["usage"]["calls"] == 20
    assert mode["price_per_1000_responses"] == pytest.approx(10.0)
    assert mode["n_several"] == 0
    assert "On pitfalls it says met where people do not in 50.0 %" in "\n".join(table["sentences"])


def test_ties_and_unscored_are_left_out_and_counted():
    items = (
        item("a", "r", "tie", True, False),
        item("b", "r", "silent", True),
        item("c", "r", "plain", True),
        item("d", "r", "not", False),
    )
    judge = ScriptedJudge(lambda response, criterion: None if criterion == "silent" else criterion != "not")
    table = check(LabelledSet(items, "table"), {"batched": judge})
    mode = table["modes"][0]
    assert table["n_ties"] == 1
    assert mode["n_compared"] == 2
    assert (mode["n_unscored"], mode["unscored"]) == (1, {"timeout": 1})
    assert mode["agreement"]["raw"]["value"] == 1.0
    assert "unscored (1 timeout)" in "\n".join(table["sentences"])


def test_a_judge_that_scores_nothing_is_an_error():
    labelled = LabelledSet((item("a", "r", "c", True),), "table")
    with pytest.raises(JudgeError, match=r"scored none of 1 criteria \(1 refusal\)"):
        check(labelled, {"batched": ScriptedJudge(lambda response, criterion: None, problem="refusal")})


def test_one_class_only_leaves_kappa_undefined_and_says_so():
    labelled = LabelledSet(tuple(item(f"p{i}", "r", "c", True) for i in range(5)), "table")
    mode = check(labelled, {"batched": ScriptedJudge(lambda response, criterion: True)})["modes"][0]
    assert mode["agreement"]["kappa"]["value"] is None
    assert "the same" in mode["agreement"]["kappa"]["note"]
    assert mode["agreement"]["raw"]["value"] == 1.0


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=4), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_peoples_agreement_is_that_of_all_their_pairs(labels):
    items = [item(f"p{i}", "r", "c", *one) for i, one in enumerate(labels)]
    counts = module._people_counts(items)
    for row, one in zip(counts, labels, strict=True):
        pairs = [(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if i != j]
        weight = 1 / (len(one) - 1)
        by_hand = [
            weight * sum(p == kind for p in pairs)
            for kind in ((True, True), (True, False), (False, True), (False, False))
        ]
        assert row.tolist() == pytest.approx(by_hand)
        # An item weighs as much as it does when the judge is set against each person.
        assert row.sum() == pytest.approx(len(one))


def test_the_ceiling_is_what_people_reach_with_each_other():
    # Two of three agree everywhere; the judge sides with the majority: two of three pairs, where people have one.
    items = tuple(
        item(f"p{i}", "r", f"c{i}", *([True, True, False] if i % 2 else [False, False, True])) for i in range(30)
    )
    judge = ScriptedJudge(lambda response, criterion: int(criterion[1:]) % 2 == 1)
    table = check(LabelledSet(items, "healthbench_meta"), {"batched": judge})
    mode = table["modes"][0]
    assert mode["agreement"]["raw"]["value"] == 1.0
    assert mode["pairwise"]["raw"]["value"] == pytest.approx(2 / 3)
    assert mode["people_pairwise"]["raw"]["value"] == pytest.approx(1 / 3)
    assert table["humans"]["raw"]["value"] == pytest.approx(1 / 3)
    assert mode["minus_people"]["raw"]["value"] == pytest.approx(1 / 3)
    assert mode["pairwise"]["balanced_f1"]["value"] == pytest.approx(2 / 3)
    assert "more than they do with each other" in "\n".join(table["sentences"])


def test_the_stricter_way_of_asking_is_found():
    items = tuple(item(f"p{i}", "r", f"c{i}", i % 2 == 0) for i in range(60))
    batched = ScriptedJudge(lambda response, criterion: int(criterion[1:]) % 4 == 0, "j (batched)")
    single = ScriptedJudge(lambda response, criterion: int(criterion[1:]) % 2 == 0, "j (per criterion)")
    table = check(LabelledSet(items, "table"), {"batched": batched, "per_criterion": single})
    found = table["between"][0]
    assert found["met_share_difference"]["value"] == pytest.approx(0.25)
    assert found["agreement_difference"]["value"] == pytest.approx(0.25)
    assert found["balanced_f1_difference"]["low"] > 0
    assert found["agreement"]["raw"]["value"] == pytest.approx(0.75)
    said = "\n".join(table["sentences"])
    assert "batched is stricter" in said
    assert "per_criterion is closer to the people" in said
    assert "never mix" in said


def test_no_difference_between_ways_is_called_none():
    labelled, decide = labelled_and_judge()
    table = check(labelled, {"batched": ScriptedJudge(decide), "per_criterion": ScriptedJudge(decide)})
    assert table["between"][0]["met_share_difference"]["value"] == 0
    assert "too few prompts to say which mode is stricter" in "\n".join(table["sentences"])  # 20 prompts


def test_one_mode_that_fails_does_not_lose_the_other(tmp_path, monkeypatch, capsys):
    labelled, decide = labelled_and_judge()
    judges = {"batched": ScriptedJudge(decide), "per_criterion": ScriptedJudge(lambda response, criterion: None)}
    table = check(labelled, judges)
    assert [m["mode"] for m in table["modes"]] == ["batched"]
    assert list(table["failures"]) == ["per_criterion"]
    assert "Mode per_criterion failed" in "\n".join(table["sentences"])
    show(table)
    assert "agreement with the majority" in capsys.readouterr().out
    failing = {mode: ScriptedJudge(lambda response, criterion: None) for mode in judges}
    with pytest.raises(JudgeError, match="scored none"):
        check(labelled, failing)

    rows = [{"prompt": "Cough?", "response": "Rest.", "criterion": "Advises rest.", "met": True}]
    path = write(tmp_path / "mine.jsonl", rows)

    def build(config):
        return ScriptedJudge(lambda r, c: True) if config.judge_mode == "batched" else judges[config.judge_mode]

    monkeypatch.setattr(module.check_file, "__kwdefaults__", module.check_file.__kwdefaults__ | {"build": build})
    with pytest.raises(JudgeError, match="per_criterion"):
        main(["check", str(path), "--judge", "openai/x"])
    assert "agreement with the majority" in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_waited_for_once(tmp_path, monkeypatch):
    monkeypatch.setattr("rgsd.judges.llm.TEST_SECONDS", 0.5)
    rows = [{"prompt": "Cough?", "response": "Rest.", "criterion": "Advises rest.", "met": True}]
    path = write(tmp_path / "mine.jsonl", rows)
    with OpenAIServer(lambda request: "", script=["hang"] * 10) as server:
        config = JudgeConfig(judge="x", judge_api_base=server.url, judge_cache=str(tmp_path / "c.sqlite"))
        with pytest.raises(JudgeUnreachable, match="no reply within"):
            check_file(path, config)
        assert len(server.records()) == 1


def test_the_cache_still_answers_for_a_server_that_is_down(tmp_path, monkeypatch):
    rows = [{"prompt": "Cough?", "response": "Rest.", "criterion": "Advises rest.", "met": True}]
    path = write(tmp_path / "mine.jsonl", rows)

    def answer(request):
        (asked,) = asked_ids(request) or ["test"]
        return json.dumps({"id": asked, "reason": "it does", "met": True})

    with OpenAIServer(answer) as server:
        config = JudgeConfig(judge="x", judge_api_base=server.url, judge_cache=str(tmp_path / "c.sqlite"))
        check_file(path, config, modes=["per_criterion"])
    table = check_file(path, config)
    assert [m["mode"] for m in table["modes"]] == ["per_criterion"]
    assert "did not answer a test call" in table["failures"]["batched"]


def test_the_table_prints(capsys):
    labelled, decide = labelled_and_judge()
    show(check(labelled, {"batched": ScriptedJudge(decide), "per_criterion": ScriptedJudge(decide)}))
    printed = capsys.readouterr().out
    assert "balanced F1" in printed
    assert "false positives, pitfall" in printed
    assert "By category" in printed


# The command.


def test_a_file_is_checked_in_the_modes_asked_for(tmp_path):
    path = write(tmp_path / "mine.jsonl", [GOOD, GOOD | {"criterion": "Hurts.", "met": False}])
    built = []

    def build(config):
        built.append(config.judge_mode)
        return ScriptedJudge(lambda response, criterion: criterion != "Hurts.", config.judge_mode)

    config = JudgeConfig(judge="openai/some")
    table = check_file(path, config, build=build)
    assert built == ["batched", "per_criterion"]
    assert [m["judge"] for m in table["modes"]] == built
    assert table["judge_settings"]["judge"] == "openai/some"
    assert len(check_file(path, config, modes=["batched"], build=build)["modes"]) == 1
    with pytest.raises(ConfigError, match=r"got \['both'\]"):
        check_file(path, config, modes=["both"], build=build)
    with pytest.raises(ConfigError, match="'checks'"):
        check_file(path, JudgeConfig(), build=build)


def test_unknown_subcommands_get_the_usage(capsys):
    with pytest.raises(UsageError, match=r"'chek'.*check"):
        main(["chek", "x"])
    with pytest.raises(UsageError, match="check"):
        main([])
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "LABELLED" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--modes"):
        main(["check", "x.csv", "--judge_mode", "batched"])
