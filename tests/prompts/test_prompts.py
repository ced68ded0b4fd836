"""Prompts of student and teacher, controls, and custom templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import rgsd
from rgsd.errors import ConfigError
from rgsd.prompts.messages import (
    PRIVILEGED_CONTEXTS,
    PromptSettings,
    reference_request,
    select_criteria,
    student_messages,
    teacher_messages,
    training_rows,
)
from rgsd.prompts.mismatched import derangement
from rgsd.prompts.rendering import PITFALL_PREFIX, template_names, template_source
from rgsd.rubrics import Criterion, Example, Rubric

QUESTION = "How do I treat a cold?  {{ 7 * 7 }} {% if %} {# no #} <b>&</b>\n"
RUBRIC = Rubric(
    (
        Criterion("Recommends rest\nand fluids.", 5, "Rest", ("axis:accuracy",)),
        Criterion("Recommends antibiotics for a cold.", -8, "Antibiotics", ("axis:safety",)),
        Criterion("Asks for the age.", 1, None, ("axis:context",)),
        Criterion("Fails to mention red flags.", -2.5, None, ("axis:safety",)),
    )
)


def example(id: str = "hb-1", question: str = QUESTION, rubric: Rubric = RUBRIC, **fields: Any) -> Example:
    return Example(id, ({"role": "user", "content": question},), rubric, **fields)


def talk() -> Example:
    turns = [("system", "Be kind."), ("user", "Hello."), ("assistant", "Hello!"), ("user", QUESTION)]
    return Example("hb-2", tuple({"role": role, "content": text} for role, text in turns), RUBRIC)


def many(n: int) -> list[Example]:
    return [example(f"e{i}", f"Question {i}?", Rubric((Criterion(f"Says {i}."),))) for i in range(n)]


def template_file(folder: Path, text: str, name: str = "mine.jinja") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- settings ---


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"privileged_context": "rubrics"}, "privileged_context"),
        ({"max_criteria": 0}, "max_criteria"),
        ({"max_criteria": True}, "max_criteria"),
        ({"max_criteria": 2.0}, "max_criteria"),
        ({"criteria_tags": "axis:accuracy"}, "criteria_tags"),
        ({"criteria_tags": ("",)}, "criteria_tags"),
        ({"seed": -1}, "seed"),
        ({"show_weights": "yes"}, "show_weights"),
        ({"template": "papr"}, "papr"),
        ({"template": ""}, "template"),
        ({"template": "no/such/file.jinja"}, "no/such/file.jinja"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PromptSettings(**fields)


def test_tags_may_come_as_a_list() -> None:
    fields: dict[str, Any] = {"criteria_tags": ["axis:safety"]}
    assert PromptSettings(**fields) == PromptSettings(criteria_tags=("axis:safety",))


# --- messages ---


@pytest.mark.parametrize("template", ["paper", "cover"])
def test_a_user_template_replaces_the_last_user_turn_only(template: str) -> None:
    messages = teacher_messages(talk(), PromptSettings(template))
    assert messages[:3] == student_messages(talk())[:3]
    assert messages[3]["role"] == "user"
    assert messages[3]["content"].startswith(QUESTION + "\n")
    assert len(messages) == 4


def test_a_system_template_extends_the_system_turn_or_becomes_one() -> None:
    messages = teacher_messages(talk(), PromptSettings("system"))
    assert messages[0]["content"].startswith("Be kind.\n\nA good response")
    assert messages[1:] == student_messages(talk())[1:]
    messages = teacher_messages(example(), PromptSettings("system"))
    assert [m["role"] for m in messages] == ["system", "user"]
    assert messages[1] == {"role": "user", "content": QUESTION}


def test_an_empty_system_turn_is_filled() -> None:
    turns = ({"role": "system", "content": " "}, {"role": "user", "content": "Hello?"})
    messages = teacher_messages(Example("a", turns, RUBRIC), PromptSettings("system"))
    assert messages[0]["content"].startswith("A good response")


def test_messages_are_copies() -> None:
    source = example()
    student_messages(source)[0]["content"] = "changed"
    assert source.messages[0]["content"] == QUESTION


def test_the_teacher_of_privileged_context_none_sees_what_the_student_sees() -> None:
    assert teacher_messages(talk(), PromptSettings(privileged_context="none")) == student_messages(talk())


@pytest.mark.parametrize("template", template_names())
@pytest.mark.parametrize("privileged_context", ["rubric", "reference", "both"])
def test_every_template_shows_what_the_privileged_context_promises(template: str, privileged_context: Any) -> None:
    settings = PromptSettings(template, privileged_context=privileged_context)
    text = "\n".join(m["content"] for m in teacher_messages(example(reference="Sleep & tea. {{ x }}"), settings))
    assert QUESTION in text
    assert ("Asks for the age." in text) == (privileged_context != "reference")
    assert ("Sleep & tea. {{ x }}" in text) == (privileged_context != "rubric")
    assert "\n\n\n" not in text.replace(QUESTION, "")
    assert template == "system" or text == text.strip()


def test_the_paper_template_in_full() -> None:
    lines = teacher_messages(example(question="Colds?"), PromptSettings())[0]["content"].split("\n")
    assert lines[0] == "Colds?"
    assert lines[2].startswith("A good response to the question above should satisfy these evaluation criteria")
    assert "hidden" in lines[2]
    assert lines[4:9] == [
        "1. Recommends rest",
        "   and fluids.",
        "2. Mistake to avoid: Recommends antibiotics for a cold.",
        "3. Asks for the age.",
        "4. Mistake to avoid: Fails to mention red flags.",
    ]
    assert "understood these criteria" in lines[10]
    assert "never mention" in lines[10]
    assert len(lines) == 11


def test_pitfalls_are_explained_only_where_there_are_any() -> None:
    without = Rubric((RUBRIC.criteria[0],))
    assert PITFALL_PREFIX.rstrip(": ") not in teacher_messages(example(rubric=without), PromptSettings())[0]["content"]


def test_the_cover_template_keeps_pitfalls_apart() -> None:
    text = teacher_messages(example(), PromptSettings("cover"))[0]["content"]
    points, mistakes = text.split("Avoid these mistakes in your answer:\n")
    assert points.endswith(
        "Cover these points in your answer:\n1. Recommends rest\n   and fluids.\n2. Asks for the age.\n\n"
    )
    assert mistakes.startswith("1. Recommends antibiotics for a cold.\n2. Fails to mention red flags.\n\n")
    only_pitfalls = Rubric((RUBRIC.criteria[1],))
    assert "Cover these" not in teacher_messages(example(rubric=only_pitfalls), PromptSettings("cover"))[0]["content"]


@pytest.mark.parametrize("template", template_names())
def test_weights_stand_after_each_criterion_as_published(template: str) -> None:
    shown = "\n".join(m["content"] for m in teacher_messages(example(), PromptSettings(template, show_weights=True)))
    assert "and fluids. [weight=5]\n" in shown
    assert "Recommends antibiotics for a cold. [weight=-8]\n" in shown
    assert "Fails to mention red flags. [weight=-2.5]\n" in shown
    hidden = "\n".join(m["content"] for m in teacher_messages(example(), PromptSettings(template)))
    assert "weight=" not in hidden


def test_the_heaviest_criteria_are_shown_in_published_order() -> None:
    settings = PromptSettings(max_criteria=2)
    assert select_criteria(RUBRIC, settings) == RUBRIC.criteria[:2]
    equal = Rubric(tuple(Criterion(f"Says {i}.") for i in range(5)))
    assert select_criteria(equal, settings) == equal.criteria[:2]
    last = Rubric((Criterion("a"), Criterion("b", 3), Criterion("c"), Criterion("d", -9)))
    assert [c.text for c in select_criteria(last, settings)] == ["b", "d"]
    assert select_criteria(last, PromptSettings(max_criteria=9)) == last.criteria


def test_only_criteria_of_the_wanted_tags_are_shown() -> None:
    settings = PromptSettings(criteria_tags=("axis:safety", "axis:context"), max_criteria=2)
    assert select_criteria(RUBRIC, settings) == (RUBRIC.criteria[1], RUBRIC.criteria[3])
    text = teacher_messages(example(), settings)[0]["content"]
    assert "1. Mistake to avoid: Recommends antibiotics" in text
    assert "rest" not in text


def test_a_rubric_without_the_wanted_tags_is_refused() -> None:
    settings = PromptSettings(criteria_tags=("axis:style",))
    with pytest.raises(ConfigError, match=r"\b1 example.*axis:style.*hb-1"):
        teacher_messages(example(), settings)
    with pytest.raises(ConfigError, match=r"\b7 .*axis:style.*e0, e1, e2, e3, e4, \.\.\."):
        training_rows(many(7), settings)


def test_references_of_the_caller_come_before_the_examples_own() -> None:
    settings = PromptSettings(privileged_context="reference")
    own, given = example(reference="Own text."), "Given text."
    assert "Own text." in teacher_messages(own, settings)[0]["content"]
    text = teacher_messages(own, settings, reference=given)[0]["content"]
    assert given in text
    assert "Own text." not in text
    for missing in (example(), example(reference="  ")):
        with pytest.raises(ConfigError, match="hb-1"):
            teacher_messages(missing, settings)


def test_the_mismatched_rubric_must_be_given() -> None:
    settings = PromptSettings(privileged_context="mismatched")
    with pytest.raises(ConfigError, match="training_rows"):
        teacher_messages(example(), settings)
    other = Rubric((Criterion("Names a river."),))
    text = teacher_messages(example(), settings, shown=other)[0]["content"]
    assert "1. Names a river." in text
    assert "rest" not in text


# --- rows ---


def test_one_row_an_example() -> None:
    rows = training_rows([example(), talk()], PromptSettings())
    assert [list(row) for row in rows] == [["example_id", "prompt", "teacher_prompt"]] * 2
    assert [row["example_id"] for row in rows] == ["hb-1", "hb-2"]
    assert rows[1]["prompt"] == student_messages(talk())
    assert rows[1]["teacher_prompt"] == teacher_messages(talk(), PromptSettings())
    json.dumps(rows)


def test_missing_references_are_counted_and_the_first_listed() -> None:
    examples = many(9)
    settings = PromptSettings(privileged_context="both")
    with pytest.raises(ConfigError, match=r"\b8 .*e1, e2, e3, e4, e5, \.\.\.\."):
        training_rows(examples, settings, {"e0": "Text."})
    rows = training_rows(examples, settings, {e.id: f"Text of {e.id}." for e in examples})
    assert "Text of e3." in rows[3]["teacher_prompt"][0]["content"]


def test_given_references_and_own_ones_are_never_mixed() -> None:
    examples = [example("a", reference="Own."), example("b", reference="Own.")]
    with pytest.raises(ConfigError, match=r"\b1 .*: b\."):
        training_rows(examples, PromptSettings(privileged_context="reference"), {"a": "Given."})
    assert len(training_rows(examples, PromptSettings(privileged_context="reference"))) == 2


def test_mismatched_rows_show_another_prompts_rubric() -> None:
    examples = many(20)
    rows = training_rows(examples, PromptSettings(privileged_context="mismatched", seed=3))
    chosen = derangement(examples, 3)
    for i, row in enumerate(rows):
        text = row["teacher_prompt"][0]["content"]
        assert f"Question {i}?" in text
        assert f"1. Says {chosen[i]}." in text
        assert row["prompt"][0]["content"] == f"Question {i}?"


def test_mismatched_rubrics_differ_as_shown() -> None:
    shared = Criterion("Is polite.", 9)
    examples = [example(f"e{i}", f"Q{i}?", Rubric((shared, Criterion(f"Says {i}.")))) for i in range(4)]
    assert len(training_rows(examples, PromptSettings(privileged_context="mismatched"))) == 4
    with pytest.raises(ConfigError, match="4 of 4"):
        training_rows(examples, PromptSettings(privileged_context="mismatched", max_criteria=1))


def test_an_empty_set_has_no_rows() -> None:
    assert training_rows([], PromptSettings()) == []


def test_a_reference_is_asked_for_with_the_rubric_in_view() -> None:
    assert reference_request(example()) == teacher_messages(example(), PromptSettings())


# --- the derangement ---


@pytest.mark.parametrize("n", [2, 3, 5, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_rubric_is_used_once_and_never_at_home(n: int, seed: int) -> None:
    chosen = derangement(many(n), seed)
    assert sorted(chosen) == list(range(n))
    assert all(i != other for i, other in enumerate(chosen))
    assert chosen == derangement(many(n), seed)


def test_seeds_differ() -> None:
    assert len({tuple(derangement(many(50), seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize("n_same", [2, 5, 10])
def test_equal_criteria_and_equal_prompts_are_never_paired(n_same: int) -> None:
    examples = many(20)
    for i in range(n_same):
        examples[i] = example(f"e{i}", f"Question {i}?", Rubric((Criterion("b"), Criterion("A  x"))))
    examples[0] = example("e0", "Question 0?", Rubric((Criterion("a x"), Criterion("B", -2))))
    examples[15] = example("e15", "question  16?", Rubric((Criterion("Only here."),)))
    for seed in range(20):
        chosen = derangement(examples, seed)
        assert sorted(chosen) == list(range(20))
        assert not any(other < n_same for other in chosen[:n_same])
        assert chosen[15] not in (15, 16)
        assert chosen[16] not in (15, 16)


@pytest.mark.parametrize("n", [0, 1])
def test_a_derangement_needs_two(n: int) -> None:
    with pytest.raises(ConfigError, match=f"got {n}"):
        derangement(many(n), 0)


def test_an_impossible_derangement_is_refused() -> None:
    same = [example(f"e{i}", f"Q{i}?") for i in range(6)]
    with pytest.raises(ConfigError, match=r"6 of 6 .*first: e0, e1, e2, e3, e4, \.\.\."):
        derangement(same, 0)
    with pytest.raises(ConfigError, match="6 of 9"):
        derangement(same + many(20)[10:13], 0)
    with pytest.raises(ConfigError, match="seed"):
        derangement(many(3), -1)


def test_twenty_thousand_are_deranged_in_seconds() -> None:
    examples = many(20_000)
    started = time.perf_counter()
    assert sorted(derangement(examples, 0)) == list(range(20_000))
    assert time.perf_counter() - started < 5.0


def test_the_derangement_does_not_depend_on_the_hash_seed() -> None:
    script = (
        "from rgsd.prompts.mismatched import derangement\nfrom rgsd.rubrics import *\n"
        "print(derangement([Example(f'e{i}', ({'role': 'user', 'content': f'Q{i}?'},),"
        " Rubric((Criterion(f'Says {i // 2}.'),))) for i in range(40)], 7))"
    )
    source = str(Path(rgsd.__file__).parents[1])
    runs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1")
    }
    assert len(runs) == 1


# --- a template of one's own ---


@pytest.mark.parametrize("name", ["mine.jinja", "mine.txt"])
def test_a_template_of_ones_own(tmp_path: Path, name: str) -> None:
    text = (
        "\ufeff{# place: system #}\nFor {{ question | upper }}:\n"
        "{% for c in criteria if not c.is_pitfall %}\n{{ c.title or 'untitled' }}/{{ c.weight }}/{{ c.tags | join }}\n"
        "{% endfor %}\n"
    )
    path = template_file(tmp_path, text, name)
    messages = teacher_messages(example(question="Colds?"), PromptSettings(path))
    assert messages[0]["content"].rstrip() == "For COLDS?:\nRest/5/axis:accuracy\nuntitled/1/axis:context"
    assert template_source(path).startswith("{# place")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = template_file(tmp_path, "{{ question }} A {{ rubric }}")
    settings = PromptSettings(path)
    assert " A 1. " in teacher_messages(example(), settings)[0]["content"]
    template_file(tmp_path, "{{ question }} B {{ rubric }}")
    assert " B 1. " in teacher_messages(example(), settings)[0]["content"]


@pytest.mark.parametrize(
    ("text", "privileged_context", "line", "named"),
    [
        ("{{ question }}", "rubric", "lines 1-1", r"\{\{ rubric \}\}"),
        ("{{ question }}\n\n{{ rubric }}", "reference", "lines 1-3", r"\{\{ reference \}\}"),
        ("{{ question }}\n{{ reference or '' }}", "both", "lines 1-2", r"\{\{ rubric \}\}"),
        ("{{ question }}{% if reference %}{{ rubric }}{% endif %}", "rubric", "lines 1-1", r"\{\{ rubric \}\}"),
        ("{{ rubric }}", "rubric", "lines 1-1", r"\{\{ question \}\}"),
        ("{{ question }}\n{% if rubric %}", "rubric", "line 2", "endif"),
        ("{{ question }}\n{{ rubric | shout }}", "rubric", "line 2", "shout"),
        ("{{ question }}\n{{ rubrics }}", "rubric", "line 2", "unknown variable 'rubrics'"),
        ("{{ question }}{{ rubric }}\n{% if 0 %}{{ answer }}{% endif %}", "rubric", "line 2", "'answer'"),
        ("{{ question }}\n{{ rubric }}\n{{ criteria[0].points }}", "rubric", "line 3", "points"),
        ("{{ question }}\n{{ rubric + 1 }}", "rubric", "line 2", "a made-up example"),
        ("{{ question }}\n{{ rubric.__class__.__mro__ }}", "rubric", "line 2", "unsafe"),
        ("{{ question }}\n{% include 'paper.jinja' %}", "rubric", "line 2", "cannot load"),
        ("{# place: assistant #}\n{{ question }}{{ rubric }}", "rubric", "line 1", "'assistant'"),
        ("{{ question }}\n{# place: system #}\n{{ rubric }}", "rubric", "line 2", "place: system"),
    ],
)
def test_a_faulty_template_names_its_file_line_and_remedy(
    tmp_path: Path, text: str, privileged_context: Any, line: str, named: str
) -> None:
    path = template_file(tmp_path, text)
    with pytest.raises(ConfigError, match=named) as caught:
        PromptSettings(path, privileged_context=privileged_context)
    assert f"{path}, {line}" in str(caught.value)


def test_a_template_that_fails_on_one_example_names_it(tmp_path: Path) -> None:
    path = template_file(tmp_path, "{{ question }}\n{% for c in criteria %}{{ c.title.upper() }}{% endfor %}")
    settings = PromptSettings(path)
    with pytest.raises(ConfigError, match=r"line 2.*'hb-1'"):
        teacher_messages(example(), settings)


def test_a_template_may_not_cut_the_question(tmp_path: Path) -> None:
    path = template_file(tmp_path, "{{ question | truncate(40) }}\n{{ rubric }}")
    settings = PromptSettings(path)
    with pytest.raises(ConfigError, match=r"\{\{ question \}\}"):
        teacher_messages(example(question="why " * 40), settings)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe{{ question }}")
    with pytest.raises(ConfigError, match="UTF-8"):
        PromptSettings(str(tmp_path / "bad.txt"))


def test_the_packages_templates_are_found() -> None:
    assert template_names() == ["cover", "paper", "system"]
    assert all("{{ rubric }}" in template_source(name) or name == "cover" for name in template_names())
    assert set(PRIVILEGED_CONTEXTS) == {"rubric", "reference", "both", "mismatched", "none"}
