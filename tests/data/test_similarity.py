"""Which prompts are near-duplicates, and that no group straddles a split."""

from __future__ import annotations

import random

import pytest

from rgsd.data import bundled, deduplicate, describe, leaks, near_duplicates, split, summarise
from rgsd.data.loading import Loaded
from rgsd.errors import DataError
from rgsd.rubrics import Criterion, Example, Rubric

RUBRIC = Rubric((Criterion("Answers."),))
CASE = (
    "A 67-year-old woman with type 2 diabetes, hypertension and a myocardial infarction four years ago comes to the "
    "emergency department with two hours of crushing chest pain that spreads to her left arm. She takes metformin, "
    "ramipril and aspirin. Her blood pressure is 92/58 mmHg, her pulse 112 a minute and regular, and her skin is cold "
    "and moist. The electrocardiogram shows ST elevation in the inferior leads and in lead V4R. Troponin is pending. "
    "The nearest hospital with a catheter laboratory is forty minutes away by road. "
)
BOILERPLATE = (
    "You are a careful assistant who answers questions from an examination. Read the question twice, think step by "
    "step, state every assumption that you make, and give the units of every number. Do not guess: when a value is "
    "missing, say which one and why it is needed. Finish with one sentence that begins with the word Answer. "
)

SAME = [
    ("What is the dose of amoxicillin for otitis media?", "What is the dose of amoxicillin for otitis media"),
    ("What is the dose of amoxicillin for otitis media?", "what is the DOSE of Amoxicillin, for otitis media?!"),
    ("What is the dose of amoxicillin for otitis media?", "What's the dose of amoxicillin for otitis media?"),
    ("Why don't ice cubes sink?", "Why don\u2019t  ice\u00a0cubes sink \u2026"),
    ("Is it na\u00efve to expect E = mc\u00b2 here?", "Is it nai\u0308ve to expect E = mc2 here?"),
    ("What are the side effects of lithium?", "Please, what are side effects of lithium? Thanks!"),
    ("**First-line** treatment of gout:\n\n- which drug?", "First-line treatment of gout: which drug?"),
    ("Does a 2\u20133 day fever need a doctor?", "Does a 2-3 day fever need a doctor?"),
    ("\u4ec0\u4e48\u662f\u9ad8\u8840\u538b\uff1f", "\u4ec0\u4e48\u662f\u9ad8\u8840\u538b"),
    (CASE + "What is the next step?", CASE.replace("67", "71") + "What is the next step?"),
    (CASE + "What is the next step?", CASE + "Which drug must be avoided?"),
    (CASE + "What is the next step?", "Consider this case. " + CASE + "Please tell me what the next step is."),
]

DIFFERENT = [
    ("What is the dose of amoxicillin for otitis media?", "What is the dose of ibuprofen for otitis media?"),
    ("What is the dose of amoxicillin for otitis media?", "What is the dose of amoxicillin for scarlet fever?"),
    ("What is the cause of pneumonia in adults?", "What is the cause of pneumonia in children?"),
    ("What is gout?", "What is gout in children?"),
    ("Does vitamin A protect the eyes?", "Does vitamin D protect the eyes?"),
    ("Solve x + 1 = 0", "Solve x - 1 = 0"),
    ("Solve x+1=0", "Solve x-1=0"),
    ("Is 1/2 > 1/3?", "Is 1/2 < 1/3?"),
    ("Is aspirin safe with warfarin?", "Is aspirin safe without warfarin?"),
    ("Can I take ibuprofen before surgery?", "Can I take ibuprofen after surgery?"),
    ("Can diabetics eat fruit?", "Can't diabetics eat fruit?"),
    ("How do I write a loop in C?", "How do I write a loop in C#?"),
    ("Does a rise in A lower B?", "Does a rise in B lower A?"),
    ("\u4ec0\u4e48\u662f\u9ad8\u8840\u538b\uff1f", "\u4ec0\u4e48\u662f\u4f4e\u8840\u538b\uff1f"),
    (
        "A 45-year-old man with type 2 diabetes and stage 3 chronic kidney disease asks about metformin. What is the "
        "highest daily dose, and which side effects should he look out for?",
        "A 45-year-old man with type 2 diabetes and stage 3 chronic kidney disease asks about lisinopril. What is the "
        "highest daily dose, and which side effects should he look out for?",
    ),
    (
        "A block of 2 kg slides down a plane of 30 degrees with a friction coefficient of 0.2. How fast is it at 3 m?",
        "A block of 5 kg slides up a plane of 45 degrees with a friction coefficient of 0.4. How fast is it at 1 m?",
    ),
    (BOILERPLATE + "What is the half-life of caffeine?", BOILERPLATE + "Which planet has the longest day of all?"),
]


def example(id_: str, *turns: str, system: str | None = None) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return Example(id_, (*([{"role": "system", "content": system}] if system else []), *messages), RUBRIC)


def groups_of(*examples: Example) -> list[list[str]]:
    return [[e.id for e in group.examples] for group in near_duplicates(examples)]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_question_in_another_form_is_grouped(one, other):
    assert groups_of(example("a", one), example("b", other)) == [["a", "b"]]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_question_of_the_same_template_is_not(one, other):
    assert groups_of(example("a", one), example("b", other)) == []


def test_a_long_instruction_that_many_prompts_carry_groups_none_of_them():
    topics = ["caffeine", "gold", "rain", "copper", "bees", "salt", "ice", "tides", "glass", "yeast", "soap", "ants"]
    template = BOILERPLATE * 4 + "Explain the role of {0} in {1}, and what would change without {0}."
    prompts = [template.format(a, b) for a in topics for b in topics[:4] if a != b]
    assert near_duplicates([example(str(n), prompt) for n, prompt in enumerate(prompts)]) == ()


OPENING = ("My son swallowed a button battery an hour ago.", "Go to an emergency department now.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((*OPENING, "Can he drink?"), (*OPENING, "How long will it take?")),
        ((*OPENING, "Can he drink?"), (OPENING[0], "Call an ambulance.", "How long will it take?")),
        ((*OPENING, "Can he drink?"), (OPENING[0].upper(), "Call an ambulance.", "How long will it take?")),
        ((*OPENING, "Can he drink?"), (OPENING[0],)),
        (("What is gout?", "A disease of the joints.", "Does diet help?"), ("What is gout",)),
        (("Hi!", "Hello.", *OPENING[:1]), ("Hi", "Hello, how can I help?", *OPENING, "Can he drink?")),
    ],
)
def test_conversations_with_one_opening_are_grouped(one, other):
    assert groups_of(example("a", *one), example("b", *other)) == [["a", "b"]]
    assert near_duplicates([example("a", *one), example("b", *other)])[0].why[-1] == "shared opening"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("Hi!", "How can I help?", "My knee hurts."), ("Hi!", "How can I help?", "Which bank is best?")),
        (("Can you help me?", "Yes.", "My knee hurts."), ("Can you help me?", "Yes.", "Which bank is best?")),
        (("My knee hurts.", *OPENING[1:], "Can I run with it?"), ("My elbow hurts.", *OPENING[1:], "Can I swim?")),
    ],
)
def test_a_greeting_or_a_stock_reply_is_no_opening(one, other):
    assert groups_of(example("a", *one), example("b", *other)) == []


def test_an_instruction_that_begins_many_conversations_is_no_opening():
    rows = [
        example(str(n), "Answer the next question in one short sentence.", "Yes.", f"What is item {n}?")
        for n in range(40)
    ]
    assert near_duplicates(rows) == ()


def test_one_system_prompt_makes_no_group_and_two_hide_none():
    assert groups_of(example("a", "Why is ice light?", system=CASE), example("b", "Who was Bohr?", system=CASE)) == []
    assert groups_of(
        example("a", "Why is ice light?", system=CASE), example("b", "Why is ice light", system="Be brief.")
    ) == [["a", "b"]]


def test_prompts_without_a_single_token_are_left_alone():
    assert groups_of(example("a", "\U0001f600"), example("b", "\U0001f622"), example("c", "???")) == []


def test_groups_do_not_depend_on_the_order():
    rows = [example(f"{n}{side}", pair[side]) for n, pair in enumerate(SAME + DIFFERENT) for side in (0, 1)]
    wanted = {frozenset(group) for group in groups_of(*rows)}
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert {frozenset(group) for group in groups_of(*rows)} == wanted


WORDS = [a + b for a in ("ka", "lo", "mi", "nu", "re", "ti", "so") for b in ("ba", "de", "fi", "gu", "ho", "ju")]


def twins(count: int) -> list[Example]:
    """Pairs of prompts: odd ones lack the question mark, or continue the conversation of the even ones."""
    rows = []
    for n in range(count):
        question = " ".join(random.Random(n).sample(WORDS, 9)) + "?"
        twin = (question[:-1],) if n % 2 else (question, "Yes.", f"And the {n}th?")
        rows += [example(f"a{n}", question), example(f"b{n}", *twin)]
    return rows


@pytest.mark.parametrize("held_out", [0.2, 40, 41])
def test_no_group_straddles_a_seeded_split(held_out):
    rows = twins(80)
    for seed in range(5):
        sides = split(rows, held_out, seed)
        assert {e.id[1:] for e in sides.held_out}.isdisjoint(e.id[1:] for e in sides.train)
        assert len(sides.groups) == 80
        # Pairs only: an odd count cannot be met, and is never exceeded.
        assert len(sides.held_out) == (32 if held_out == 0.2 else 40)
        assert len(sides.train) + len(sides.held_out) == 160


def test_a_group_that_fits_on_no_side_is_said():
    with pytest.raises(DataError, match="held_out=1"):
        split(twins(10), 1, seed=0)


def test_a_fixed_split_names_the_training_side_of_each_straddling_group():
    rows = twins(10)
    found = leaks(rows[1::2] + rows[:4:2], rows[4::2])
    assert [e.id for e in found.train] == [f"b{n}" for n in range(2, 10)]
    assert len(found.groups) == 8


def test_the_bundled_data_have_no_near_duplicates():
    assert near_duplicates(bundled().examples) == ()


def test_the_summary_counts_and_shows_groups():
    loaded = Loaded(tuple(twins(3)), "rgsd", 6)
    near = summarise(loaded)["near_duplicates"]
    assert (near["groups"], near["prompts"]) == (3, 6)
    assert near["first"][0]["prompts"][0].startswith("a0: ")
    text = describe(loaded)
    assert "3 groups of near-duplicates, 6 prompts" in text
    assert "near-duplicates (same text): a1: " in text


def test_candidates_by_prefix_are_those_of_the_plain_comparison(monkeypatch):
    """Compare with a check of every pair, on increasingly edited texts."""
    from rgsd.data import close_texts

    rng = random.Random(0)
    rows = []
    for n in range(12):
        words = rng.choices(WORDS, k=rng.randint(20, 120))
        for edits in range(8):
            changed = [rng.choice(WORDS) if rng.random() < edits / 200 else word for word in words]
            rows.append(example(f"{n}-{edits}", " ".join(changed)))
    rows = list(deduplicate(rows).examples)
    found = groups_of(*rows)
    monkeypatch.setattr(close_texts, "_rarest", lambda grams, copies, *_: [g for g in grams.tolist() if copies[g] > 1])
    assert groups_of(*rows) == found
    assert len(found) > 3
