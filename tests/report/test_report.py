"""`rgsd report`: its numbers are the run's, its page is inert and complete, and no state of a run breaks it."""

import base64
import hashlib
import json
import shutil

import pytest
from support.made_runs import HOSTILE, make_runs
from support.reports import Page, arm_rows, made, page_of

from rgsd.cli import main
from rgsd.errors import RunError
from rgsd.evaluation import compare
from rgsd.evaluation.run_ref import RunRef
from rgsd.evaluation.samples import read_samples
from rgsd.report import TOKEN_MAPS, facts, page, read, report_page
from rgsd.report.page import as_json, embedded_json
from rgsd.runs import open_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """Folder with the finished runs rgsd/ and grpo/."""
    return make_runs(tmp_path_factory.mktemp("runs"), tokenizer)


# Numbers.


def test_the_pages_numbers_are_the_runs(runs):
    table = json.loads((runs / "rgsd" / "results.json").read_text())
    found = read([str(runs / "rgsd")]).runs[0]
    assert [a.name for a in found.arms] == [a["arm"] for a in table["arms"]]
    assert [a.role for a in found.arms] == ["baseline", "conditioned", "trained"]
    for mine, theirs in zip(found.arms, table["arms"], strict=True):
        assert mine.score == theirs["score"]
        assert mine.gain == table["differences"].get(f"{mine.name} - base")
        assert mine.tokens["mean"] == theirs["mean_tokens"]
    seen = page_of(runs / "rgsd")
    for arm in table["arms"]:
        assert f"{arm['score']['mean']:.3f}" in seen.words
    assert found.problems == []


def test_cost_counts_rollouts_tokens_and_calls_beside_grpo(runs):
    rgsd, grpo = read([str(runs / "rgsd"), str(runs / "grpo")]).runs
    lines = {k: [s for s in open_run(runs / k).read_lines("metrics.jsonl") if "loss" in s] for k in ("rgsd", "grpo")}
    assert (rgsd.kind, grpo.kind) == ("rgsd", "grpo")
    assert rgsd.cost.rollouts == 2 * 4
    assert grpo.cost.rollouts == len(open_run(runs / "grpo").read_lines("rollouts.jsonl")) == 16
    assert rgsd.cost.sampled_tokens == round(sum(4 * s["response_length"] for s in lines["rgsd"]))
    assert grpo.cost.sampled_tokens == round(sum(8 * s["completions/mean_length"] for s in lines["grpo"]))
    assert rgsd.cost.train_seconds == pytest.approx(
        sum(v for s in lines["rgsd"] for k, v in s.items() if "seconds/" in k)
    )
    assert (rgsd.cost.train_calls, rgsd.cost.train_price) == (0, 0.0)
    sentence = facts.cost_sentence([rgsd, grpo])
    assert "8 against 16 sampled responses" in sentence
    assert sentence in page_of(runs / "rgsd", runs / "grpo").words
    grpo.run.meta["held_out_fingerprint"] = "another"
    assert facts.cost_sentence([rgsd, grpo]) is None


def test_money_of_a_grpo_run_is_summed_from_its_rollouts(runs, tmp_path):
    shutil.copytree(runs / "grpo", tmp_path / "paid")
    path = tmp_path / "paid" / "rollouts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["usage"] |= {"calls": 1, "price": 0.25}
    rows[0]["usage"] |= {"calls": 0, "cached": 1, "price": 0.0}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"half a li')
    cost = read([str(tmp_path / "paid")]).runs[0].cost
    assert (cost.train_calls, cost.train_cached, cost.train_price) == (15, 1, 3.75)
    assert "$3.75" in page_of(tmp_path / "paid").words
    rows[3]["usage"]["price"] = None
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read([str(tmp_path / "paid")]).runs[0].cost.train_price is None
    assert "unknown" in page_of(tmp_path / "paid").words


def test_several_runs_are_set_against_the_first_as_rgsd_compare_does(runs):
    found = read([str(runs / "rgsd"), str(runs / "grpo")])
    seed = found.runs[0].run.settings.get("seed", 42)
    wanted = compare.compare(
        compare.read_arms([RunRef(f"{runs}/{kind}", "trained") for kind in ("rgsd", "grpo")]), seed=seed
    )
    assert found.comparison["differences"] == wanted["differences"]
    seen = page_of(runs / "rgsd", runs / "grpo")
    for sentence in wanted["sentences"]:
        assert " ".join(sentence.split()) in seen.words
    assert seen.data["arms"][0] == "rgsd: base"


def test_criteria_won_and_lost_are_counted(tmp_path):
    def pitfall(s, i):
        return [
            {"criterion": "Good.", "weight": 2.0, "tags": ["kind"], "met": s > 0.5, "grade": None, "reason": ""},
            {
                "criterion": "Bad.",
                "weight": -1.0,
                "tags": ["trap"],
                "met": i == 0 and s > 0.5,
                "grade": None,
                "reason": "",
            },
        ]

    folder = made(
        tmp_path / "r",
        arm_rows("base", [0.0, 0.0, 0.0], verdicts=pitfall),
        arm_rows("trained", [1.0, 1.0, 0.0], verdicts=pitfall),
    )
    change = read([str(folder)]).runs[0].change
    assert (change["criteria"]["won"], change["criteria"]["lost"], change["criteria"]["n"]) == (2, 1, 6)
    words = page_of(folder).words
    assert "From base to trained, 2 criteria were won and 1 lost, of 6 that were scored in both" in words
    assert "pitfall Bad." in words


@pytest.mark.parametrize(
    ("base", "trained", "headline", "direction"),
    [
        ([0.1, 0.2, 0.3, 0.2], [0.6, 0.7, 0.8, 0.9], "trained is better than base: +55.0 points", "up"),
        ([0.6, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.2], "trained is worse than base: -55.0 points", "down"),
        ([0.1, 0.9, 0.1, 0.9], [0.9, 0.1, 0.9, 0.2], "trained against base: no gain shown: +2.5 points", "flat"),
    ],
)
def test_the_headline_says_no_more_than_the_interval(tmp_path, base, trained, headline, direction):
    folder = made(tmp_path / "r", arm_rows("base", base * 8), arm_rows("trained", trained * 8))
    seen = page_of(folder)
    assert headline in seen.words
    assert any(tag == "p" and attrs.get("class") == f"big {direction}" for tag, attrs in seen.elements)
    few = page_of(made(tmp_path / "few", arm_rows("base", base), arm_rows("trained", trained)))
    assert any(tag == "p" and attrs.get("class") == "big flat" for tag, attrs in few.elements)
    assert "trained against base: too few prompts to say" in few.words


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"privileged_context": "mismatched"}, "This run is a control: its teacher saw another prompt's rubric."),
        ({"privileged_context": "none"}, "This run is a control: its teacher saw no rubric."),
        ({}, "This run alone cannot tell whether the right rubric mattered"),
    ],
)
def test_controls_are_named(tmp_path, settings, sentence):
    folder = made(tmp_path / "r", arm_rows("base", [0.1] * 30), arm_rows("trained", [0.9] * 30), settings=settings)
    assert sentence in page_of(folder).words


def test_a_supervised_control_has_its_own_cost_and_name(tmp_path):
    arms = [arm_rows("base", [0.1] * 5), arm_rows("trained", [0.9] * 5)]
    sampled = {"n_sampled": 40, "n_tokens": 800, "n_truncated": 1, "n_leaking": 2, "seconds": 3.0}
    folder = made(tmp_path / "r", *arms, settings={"responses_per_prompt": 1}, conditioned_responses=sampled)
    open_run(folder).append("metrics.jsonl", [{"step": s, "loss": 2.0 / s, "step_time": 1.5} for s in (1, 2)])
    found = read([str(folder)]).runs[0]
    assert found.kind == "sft"
    assert (found.cost.rollouts, found.cost.sampled_tokens, found.cost.train_seconds) == (40, 800, 3.0)
    words = page_of(folder).words
    assert "This run is a control: it was fine-tuned" in words
    assert "Loss on the conditioned model's responses" in words


def test_a_rubric_worth_nothing_is_said_to_teach_nothing(tmp_path):
    arms = [arm_rows(n, [0.5, 0.4, 0.6] * 10) for n in ("base", "base+rubric", "trained")]
    assert "not shown that the teacher had anything to teach" in page_of(made(tmp_path / "r", *arms)).words
    arms[1] = arm_rows("base+rubric", [0.1, 0.0, 0.2] * 10)
    assert "the teacher had nothing to teach" in page_of(made(tmp_path / "worse", *arms)).words


def test_leaks_are_counted_and_marked(tmp_path):
    leak = arm_rows("trained", [0.5, 0.5], text="As the rubric requires, I mention rest.")
    folder = made(tmp_path / "r", arm_rows("base", [0.5, 0.5]), leak)
    seen = page_of(folder)
    assert "100 % of the trained responses mention a rubric" in seen.words
    assert [p["a"]["1"].get("l") for p in seen.data["prompts"]] == [1, 1]
    assert [p["a"]["0"].get("l") for p in seen.data["prompts"]] == [None, None]


# The page.


def test_the_page_loads_nothing_and_runs_only_its_own_script(runs):
    html = report_page(read([str(runs / "rgsd"), str(runs / "grpo")]))
    seen = Page(html)
    assert [tag for tag, _ in seen.elements if tag in ("script", "style", "link", "img", "iframe")] == [
        "style", "script", "script",
    ]  # fmt: skip
    for _, attrs in seen.elements:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        assert attrs.get("href", "#").startswith("#")
        assert "src" not in attrs
    policy = next(a["content"] for t, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    for text in (seen.raw["style"][0], seen.raw["script"][1]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_texts_of_a_run_stay_texts(runs):
    html = report_page(read([str(runs / "rgsd")]))
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "<b>syrup" not in html
    seen = Page(html)
    questions = {p["q"] for p in seen.data["prompts"]}
    assert any(HOSTILE in q for q in questions)  # whole, as data
    assert "Recommends <b>syrup</b>" in " ".join(c[0] for p in seen.data["prompts"] for c in p["c"])


FOREIGN = {"img", "b", "iframe", "object", "embed", "link", "base"}
"""Elements that no page of ours has."""


def test_nothing_of_a_run_becomes_markup(tmp_path):
    """Markup in every text that a template shows: names, criteria, tags, judge, settings, command, errors."""

    def hostile(s, i):
        return [
            {"criterion": HOSTILE, "weight": 1.0, "tags": [HOSTILE], "met": s > 0.5, "grade": None, "reason": HOSTILE}
        ]

    def arm(name, scores):
        return [r | {"judge": HOSTILE, "arm": name} for r in arm_rows(name, scores, verdicts=hostile, text=HOSTILE)]

    settings = {"model_name_or_path": HOSTILE, "models": [HOSTILE]}
    arms = [arm("base<img>", [0.1, 0.2]), arm("better<img>", [0.9, 0.8])]
    one = made(tmp_path / "<img src=x>", *arms, settings=settings, command=HOSTILE, status=HOSTILE)
    two = made(tmp_path / "<b>two", *arms, settings=settings)
    token = {
        "t": HOSTILE,
        "d": 1.0,
        "c": 1.0,
        "m": True,
        "pt": 0.1,
        "ps": 0.2,
        "T": [[HOSTILE, 1]],
        "S": [[HOSTILE, 1]],
    }
    found = {
        **dict.fromkeys(("example_id", "policy", "model", "question", "source"), HOSTILE),
        **dict.fromkeys(("mean", "mean_clipped", "top_tenth_share", "n_in_loss", "n_tokens"), 1),
        "tokens": [token],
        "settings": {
            "privileged_context": "rubric",
            "beta": 0.5,
            "clip": "none",
            "clip_threshold": 0.05,
            "temperature": 1.0,
        }
        | {"template": HOSTILE},
        "criteria": [{"criterion": HOSTILE, "weight": 1.0, "tags": [], "is_shown": True}],
        "teacher_prompt": [{"role": HOSTILE, "content": HOSTILE}],
    }
    pages = [report_page(read([str(one)])), report_page(read([str(one), str(two)])), page.token_page(found)]
    for html in pages:
        seen = Page(html)
        assert not {tag for tag, _ in seen.elements} & FOREIGN
        assert [tag for tag, _ in seen.elements].count("script") == 2
        assert "alert(1)" in seen.words  # shown, as text


def test_embedded_json_cannot_end_its_element():
    value = {"a": "</script><!--<script> \u2028 &amp; é"}
    text = str(embedded_json(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_lone_surrogates_of_a_model_are_written(tmp_path):
    folder = made(tmp_path / "r", arm_rows("base", [0.5], text="half \ud83d of a pair"))
    assert main(["report", str(folder), "-o", str(tmp_path / "x.html")]) == 0
    assert "half ? of a pair" in (tmp_path / "x.html").read_text("utf-8")


def test_responses_are_all_there_once_by_prompt(runs):
    seen = page_of(runs / "rgsd")
    samples = read_samples(open_run(runs / "rgsd"))
    assert seen.data["arms"] == ["base", "base+rubric", "trained"]
    assert (seen.data["left"], seen.data["right"]) == (0, 2)
    assert len(seen.data["prompts"]) == 4
    by_key = {(p["id"], seen.data["arms"][int(k)]): r for p in seen.data["prompts"] for k, r in p["a"].items()}
    for sample in samples:
        shown = by_key[(sample.example_id, sample.arm)]
        assert shown["r"] == sample.response
        assert shown["v"] == [v.value for v in sample.verdicts]
        assert shown["s"] == pytest.approx(sample.score, abs=1e-4)


def test_reasoning_and_reasons_of_a_judge_are_kept(tmp_path):
    rows = arm_rows("trained", [0.5])
    rows[0] |= {"response": "<think>hm</think>an answer", "judged_text": "an answer", "judge": "llm:x"}
    rows[0]["verdicts"][0]["reason"] = "because"
    (prompt,) = page_of(made(tmp_path / "r", rows)).data["prompts"]
    assert prompt["a"]["0"]["r"] == "an answer"
    assert prompt["a"]["0"]["full"] == "<think>hm</think>an answer"
    assert prompt["a"]["0"]["w"] == ["because"]


def test_token_maps_of_a_run_are_shown(runs, tmp_path):
    shutil.copytree(runs / "rgsd", tmp_path / "rgsd")
    one = {"t": "rest", "d": 0.5, "c": 0.1, "m": True, "pt": 0.4, "ps": 0.1, "T": [["rest", 0.4]], "S": [["go", 0.5]]}
    old = {"example_id": "r1", "policy": "base", "question": "q", "criteria": [], "tokens": [one | {"d": 9.0}]}
    open_run(tmp_path / "rgsd").append(TOKEN_MAPS, [old, old | {"tokens": [one]}])
    seen = page_of(tmp_path / "rgsd")
    assert [m["tokens"] for m in seen.data["maps"]] == [[one]]  # the later map of the same response
    assert ("section", "tokens") in {(tag, attrs.get("id")) for tag, attrs in seen.elements}
    assert page_of(runs / "rgsd").data["maps"] == []


# What is not there.


def test_a_new_run_has_a_page(tmp_path):
    folder = made(tmp_path / "r", status="running")
    seen = page_of(folder)
    assert "This run is not finished (status 'running')" in seen.words
    assert "Nothing was scored, so there is no result to show." in seen.words
    assert "No training step has been logged." in seen.words
    assert seen.data["prompts"] == []


def test_a_run_killed_after_its_baselines_has_a_page(runs, tmp_path):
    shutil.copytree(runs / "rgsd", tmp_path / "rgsd")
    run = open_run(tmp_path / "rgsd")
    run.note(status="running")
    (run.folder / "results.json").unlink()
    kept = [r for r in run.read_lines("samples.jsonl") if r["arm"] != "trained"]
    (run.folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept) + '{"arm": "trai')
    seen = page_of(tmp_path / "rgsd")
    assert "The trained policy has not been evaluated." in seen.words
    assert "base+rubric against base: too few prompts to say" in seen.words
    assert "This run has no pair of arms to compare." in seen.words


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl", "rollouts.jsonl"])
def test_a_broken_line_is_an_error_with_its_place_and_nothing_is_left_out(runs, tmp_path, capsys, name):
    shutil.copytree(runs / "grpo", tmp_path / "grpo")
    path = tmp_path / "grpo" / name
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\nnot json\n{rest}")
    assert main(["report", str(tmp_path / "grpo"), "-o", str(tmp_path / "r.html")]) == 1
    assert f"{name}, line 2: got 'not json'" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_half_written_last_line_costs_that_row_alone(runs, tmp_path, capsys):
    shutil.copytree(runs / "rgsd", tmp_path / "rgsd")
    with (tmp_path / "rgsd" / "samples.jsonl").open("a") as file:
        file.write('{"arm": "trained", "exam')
    whole, torn = (read([str(f / "rgsd")]).runs[0] for f in (runs, tmp_path))
    assert [a.score for a in torn.arms] == [a.score for a in whole.arms]
    assert "half written" in capsys.readouterr().out


def test_roles_are_the_runs_own_whatever_the_arms_are_called(tmp_path):
    folder = made(
        tmp_path / "r",
        arm_rows("untouched", [0.1] * 12),
        arm_rows("trained", [0.2] * 12),
        arm_rows("policy", [0.9] * 12),
        roles={"policy": "trained", "trained": "control", "untouched": "baseline"},
    )
    found = read([str(folder)]).runs[0]
    assert {a.name: a.role for a in found.arms} == {"untouched": "baseline", "trained": "control", "policy": "trained"}
    assert (found.after.name, round(found.after.gain["mean"], 6)) == ("policy", 0.8)
    assert found.change["difference"]["mean"] == pytest.approx(0.8)


def test_a_run_with_a_trained_arm_alone_does_not_contradict_itself(tmp_path):
    """Like every arm of the lab."""
    folder = made(tmp_path / "r", arm_rows("trained", [0.7] * 12), roles={"base": "baseline", "trained": "trained"})
    found = read([str(folder)]).runs[0]
    assert [(a.role, a.gain) for a in found.arms] == [("trained", None)]
    words = page_of(folder).words
    assert "trained scores 0.700 on 12 prompts" in words
    assert "The base model has not been evaluated." in words
    assert "The trained policy has not been evaluated." not in words


def test_unscored_responses_are_not_zero(tmp_path):
    folder = made(tmp_path / "r", arm_rows("base", [0.5, 0.5]), arm_rows("trained", [None, None]))
    found = read([str(folder)]).runs[0]
    assert found.arms[1].score is None
    seen = page_of(folder)
    assert "Only 0.0 % of the criteria of trained were scored" in seen.words
    assert "unscored" in seen.words


def test_runs_that_cannot_be_compared_still_have_a_page(runs, tmp_path):
    other = made(tmp_path / "other", arm_rows("base", [0.5]), arm_rows("trained", [0.6]))
    seen = page_of(runs / "rgsd", other)
    assert "The runs cannot be compared" in seen.words
    assert "share no prompt" in seen.words
    empty = made(tmp_path / "empty")
    assert "empty has no judged responses" in page_of(runs / "rgsd", empty).words


def test_an_evaluation_of_models_has_a_page(tmp_path):
    folder = made(
        tmp_path / "e",
        arm_rows("small", [0.1, 0.2, 0.3]),
        arm_rows("large", [0.8, 0.9, 0.9]),
        settings={"models": ["a"]},
        kind="eval",
        roles={"small": "baseline", "large": "candidate"},
    )
    found = read([str(folder)]).runs[0]
    assert found.kind == "eval"
    assert "large against small: too few prompts to say" in page_of(folder).words


def test_a_conditioning_gap_has_a_page_with_its_advice(tmp_path):
    settings = {"models": ["m"], "templates": ["cover"]}
    arms = [arm_rows("base", [0.1] * 30), arm_rows("base+rubric (cover)", [0.7] * 30)]
    roles = {"base": "baseline", "base+rubric (cover)": "conditioned"}
    folder = made(tmp_path / "g", *arms, settings=settings, kind="gap", roles=roles)
    open_run(folder).write("results.json", {"advice": ["It can pay.", "To train: `rgsd train`"]})
    found = read([str(folder)]).runs[0]
    assert found.kind == "gap"
    assert [a.role for a in found.arms] == ["baseline", "conditioned"]
    seen = page_of(folder)
    assert "It can pay." in seen.words
    assert "+60.0" in seen.words
    assert any(attrs.get("class") == "big up" for _, attrs in seen.elements)
    (folder / "results.json").write_text("[]")
    assert "base+rubric (cover) is better than base: +60.0 points" in page_of(folder).words


def test_a_step_taken_twice_after_a_resume_counts_once(runs, tmp_path):
    shutil.copytree(runs / "rgsd", tmp_path / "rgsd")
    run = open_run(tmp_path / "rgsd")
    first = next(s for s in run.read_lines("metrics.jsonl") if "loss" in s)
    run.append("metrics.jsonl", [first | {"divergence": 123.0}])
    steps = read([str(run.folder)]).runs[0].steps
    assert [s["step"] for s in steps] == [1, 2]
    assert steps[0]["divergence"] == 123.0


# The command.


def test_the_command_writes_page_and_numbers(runs, tmp_path, capsys):
    assert main(["report", str(runs / "rgsd"), "-o", str(tmp_path / "deep" / "r.html")]) == 0
    assert str(tmp_path / "deep" / "r.html") in capsys.readouterr().out
    assert (tmp_path / "deep" / "r.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(runs / "rgsd"), "-o", str(tmp_path / "deep" / "r.html")]) == 0  # made anew
    assert main(["report", str(runs / "rgsd"), "--output", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(as_json(read([str(runs / "rgsd")]))))
    assert main(["report", str(runs / "rgsd"), "--output", str(tmp_path / "r.json")]) == 0
    assert main(["report", str(runs / "rgsd")]) == 0
    assert (runs / "rgsd" / "report.html").is_file()
    mine = runs / "rgsd" / "config.yaml"
    kept = mine.read_text()
    capsys.readouterr()
    assert main(["report", str(runs / "rgsd"), "-o", str(mine)]) == 1  # a slip of the hand
    assert "is not a report" in capsys.readouterr().err
    assert mine.read_text() == kept


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["{}/model"], "is not a run folder"),
        (["{}/rgsd", "{}/grpo/../rgsd"], "twice"),
        (["{}/rgsd", "-o", "{}"], "is a folder"),
    ],
)
def test_wrong_calls_say_what_to_do(runs, capsys, names, message):
    assert main(["report", *(n.format(runs) for n in names)]) == 1
    assert message in capsys.readouterr().err


def test_a_page_is_not_replaced_unasked(tmp_path):
    page.write_page(tmp_path / "x.html", "one")
    with pytest.raises(RunError, match="--overwrite"):
        page.write_page(tmp_path / "x.html", "two")
    page.write_page(tmp_path / "x.html", "two", overwrite=True)
    assert (tmp_path / "x.html").read_text() == "two"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.html"]
