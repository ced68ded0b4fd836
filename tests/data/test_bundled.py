"""The bundled prompts: their contents, their split, and that they match their sources."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from rgsd.data import bundled

SOURCES = Path(__file__).parents[2] / "data_source"
KINDS = ("emergency", "medication", "is-it-true", "why", "compare", "how-to", "numbers")
SPLITS = ("train", "dev", "held-out")
COMMON = set(
    re.findall(
        r"\w+",
        "a an and are at be between can did difference do does for from have how i if in is it long many me much my of "
        "on or right s should so t than that the there this to true was we what when which while why with now",
    )
)
"""Words that say what kind of question it is, or nothing."""


@pytest.fixture(scope="module")
def examples():
    return bundled().examples


def tag(example: Any, name: str) -> str:
    """The text after `name:` in the only tag that starts with it."""
    (value,) = [t.removeprefix(f"{name}:") for t in example.tags if t.startswith(f"{name}:")]
    return value


def build() -> Any:
    """The module data_source/build.py."""
    spec = importlib.util.spec_from_file_location("data_source_build", SOURCES / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["data_source_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_sources_give():
    for path, text in build().files().items():
        assert path.read_text("utf-8") == text, f"{path.name}: run python data_source/build.py"


@pytest.mark.parametrize(
    ("check", "met", "unmet"),
    [
        ("cool & water|tap", "Cool it under the tap.", "Cool it. Use water."),
        ("cool & {TAP}", "Cool it at the faucet.", "Cool it."),
        ("!rub", "Do not rub it.", "Rub it."),
        ("!rub|press", "Never press it.", "Press it."),
        ("!(?:wait)|at once", "Go at once.", "Wait a day."),
        ("!(?:wait)|at once", "Do not wait.", "Do not go at once."),
        ("(?:a|b) & c", "a, c", "a, b"),
        ("water", "Use water.", "Do not use water."),
        ("water", "If it does not stop, use water.", "Should I use water?"),
    ],
)
def test_a_short_check_is_compiled(check, met, unmet):
    from rgsd.rubrics.checks import holds

    compiled = build().compiled(check, {"TAP": "tap|faucet"})
    assert holds(compiled, met)
    assert not holds(compiled, unmet)


def test_every_kind_has_its_prompts_in_every_split(examples):
    assert len(examples) >= 360
    counts = Counter((tag(e, "kind"), tag(e, "split")) for e in examples)
    for kind in KINDS:
        train, dev, held_out = (counts[kind, split] for split in SPLITS)
        assert 25 <= train <= 29, kind
        assert 8 <= dev <= 10, kind
        assert 16 <= held_out <= 19, kind
    assert sum(counts.values()) == len(examples)
    assert {e.domain for e in examples} == {"medicine", "science"}
    assert {e.domain for e in examples if tag(e, "kind") in ("emergency", "medication")} == {"medicine"}


def test_a_rubric_is_its_kinds_criteria_facts_of_its_own_and_pitfalls(examples):
    kinds = yaml.safe_load((SOURCES / "kinds.yaml").read_text("utf-8"))["kinds"]
    for e in examples:
        assert e.rubric.is_checkable, e.id
        assert all(c.tags[0] in ("form", "content", "safety", "pitfall") and len(c.tags) == 2 for c in e.rubric), e.id
        assert all(1 <= abs(c.weight) <= 10 for c in e.rubric), e.id
        assert all(c.is_pitfall == (c.tags[0] == "pitfall") for c in e.rubric), e.id
        own = [c for c in e.rubric if c.tags[1] in ("own", "emergency-call")]
        wanted = {c.tags[1] for c in e.rubric if not c.is_pitfall} - {"own", "emergency-call"}
        penalised = {c.tags[1] for c in e.rubric if c.is_pitfall} - {"claim"}
        kind = kinds[tag(e, "kind")]
        assert (wanted, penalised) == (set(kind["wants"]), set(kind["penalises"])), e.id
        assert 2 <= len(own) <= 3, e.id
        assert 1 <= sum(c.is_pitfall for c in e.rubric) <= 3, e.id
    criteria = [c for e in examples for c in e.rubric]
    assert 0.28 <= sum(c.is_pitfall for c in criteria) / len(criteria) <= 0.35


def test_a_form_is_wanted_about_as_much_as_it_is_penalised(examples):
    balance: dict[str, float] = defaultdict(float)
    for c in (c for e in examples for c in e.rubric if c.tags[1] not in ("own", "emergency-call", "claim")):
        balance[c.tags[1]] += c.weight
    # Over all prompts, no form gains more than 0.25 points per prompt if a policy always uses it.
    assert all(abs(weight) / len(examples) < 0.25 for weight in balance.values()), dict(balance)


def test_no_prompt_has_a_near_duplicate_in_another_split(examples):
    words = {e.id: set(re.findall(r"\w+", e.messages[-1]["content"].lower())) - COMMON for e in examples}
    for a, b in itertools.combinations(examples, 2):
        if tag(a, "split") != tag(b, "split"):
            shared = len(words[a.id] & words[b.id]) / len(words[a.id] | words[b.id])
            assert shared < 0.45, (a.messages[-1]["content"], b.messages[-1]["content"])
    assert len({e.prompt_key for e in examples}) == len(examples)
