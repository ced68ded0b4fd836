"""The world: deterministic, split without overlap, and judged exactly."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from rgsd.data import load
from rgsd.errors import ConfigError, DataError
from rgsd.judges import ChecksJudge
from rgsd.lab.vocabulary import KIND_NAMES, KINDS, MODIFIERS, TOPICS, plain_thoughts, rubric_thought
from rgsd.lab.world import SPLITS, WEIGHTS, World, read_fact, write_jsonl
from rgsd.prompts.leaks import mentions_rubric
from rgsd.rubrics import checks, fingerprint, score


@pytest.fixture(scope="module")
def world():
    return World()


def satisfaction(example, response):
    return score(example.rubric, ChecksJudge().judge(example, response).verdicts, example.scoring, response).value


def with_pitfall(world, sort):
    return next(e for e in world.examples() if f"pitfall:{sort}" in e.rubric.criteria[-1].tags)


# --- The same everywhere --------------------------------------------------------------------------------------------


def test_the_world_is_the_one_that_the_shipped_model_knows(world):
    assert world.digest() == "ff148ae7af471470"


def test_the_tasks_are_pinned(world):
    assert fingerprint(world.examples()) == "da1b1911876376af"


def test_another_process_with_other_hash_seeds_makes_the_same_world(world):
    code = (
        "from rgsd.lab.world import World; from rgsd.rubrics import fingerprint as f; "
        "print(f(World(1, 2, 0.5).examples()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == fingerprint(World(1, 2, 0.5).examples())


def test_the_world_needs_no_torch():
    code = "import rgsd.lab.world, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_seeds_change_what_they_name_and_nothing_else(world):
    other_task, other_facts = World(task_seed=1), World(seed=1)
    assert other_task.digest() == world.digest()
    assert fingerprint(other_task.examples()) != fingerprint(world.examples())
    assert other_facts.digest() != world.digest()
    assert all(other_facts.ask(t, m) == world.ask(t, m) for t, m in itertools.product(TOPICS, MODIFIERS))


# --- Words ----------------------------------------------------------------------------------------------------------


def test_words_are_told_apart():
    assert len(TOPICS) == len(set(TOPICS)) == 48
    assert len(MODIFIERS) == len(set(MODIFIERS)) == 24
    values = [value for kind in KINDS for value in kind.values]
    assert len(values) == len(set(values)) == 12 * 16
    # One word of a response decides which kind of fact comes.
    assert len({kind.says.split()[0] for kind in KINDS}) == len(KINDS)


def test_a_myth_is_wrong_and_some_are_believed(world):
    pairs = list(itertools.product(TOPICS, KIND_NAMES))
    assert all(world.myth(t, k).value != world.fact(t, k).value for t, k in pairs)
    assert 0.12 < sum(world.is_believed(t, k) for t, k in pairs) / len(pairs) < 0.22


def test_habits_have_nothing_to_do_with_rubrics(world):
    overlaps = []
    for modifier in MODIFIERS:
        usual = world.habits(modifier)
        assert len(set(usual)) == len(usual) == 4
        assert World(task_seed=1).habits(modifier) == usual
        asked = [set(World(task_seed=seed).ask("dravix", modifier).kinds) for seed in range(20)]
        overlaps += [len(kinds & set(usual)) / len(kinds) for kinds in asked]
    assert sum(overlaps) / len(overlaps) == pytest.approx(4 / 12, abs=0.04)


# --- Splits ---------------------------------------------------------------------------------------------------------


def test_splits_share_no_prompt_and_cover_all(world):
    keys = {split: {e.prompt_key for e in world.examples(split)} for split in SPLITS}
    assert {split: len(k) for split, k in keys.items()} == {"train": 768, "dev": 96, "held-out": 288}
    assert len(set.union(*keys.values())) == 48 * 24
    assert {e.id for e in world.examples()} == {e.id for split in SPLITS for e in world.examples(split)}


@pytest.mark.parametrize(("what", "counts"), [("topic", (16, 2, 6)), ("modifier", (32, 4, 12))])
def test_every_topic_and_modifier_is_met_equally_often_in_each_split(world, what, counts):
    for split, wanted in zip(SPLITS, counts, strict=True):
        assert set(Counter(e.metadata[what] for e in world.examples(split)).values()) == {wanted}


def test_the_order_mixes_topics_and_modifiers(world):
    first = world.examples("train")[:64]
    assert len({e.metadata["modifier"] for e in first}) > 15
    assert len({e.metadata["topic"] for e in first}) > 25


def test_unknown_names_are_refused(world):
    with pytest.raises(ConfigError, match="'test'"):
        world.examples("test")
    with pytest.raises(DataError, match="topic 'dragon'"):
        world.question("dragon", "cook")
    with pytest.raises(ConfigError, match="generality"):
        World(generality=1.5)


# --- The verifier ---------------------------------------------------------------------------------------------------


def test_rubrics_have_what_the_docs_say(world):
    for example in world.examples():
        asked = [c for c in example.rubric if not c.is_pitfall]
        assert 3 <= len(asked) <= 5
        assert len(example.rubric) - len(asked) <= 1
        assert len({c.weight for c in asked}) == len(asked)
        assert {c.weight for c in asked} <= set(WEIGHTS)
        for criterion in example.rubric:
            checks.validate(criterion.check)
    assert sum(any(c.is_pitfall for c in e.rubric) for e in world.examples()) == 48 * 12


def test_the_ideal_response_scores_one(world):
    assert {satisfaction(e, e.reference) for e in world.examples()} == {1.0}


def test_each_missing_fact_costs_its_weight(world):
    for example in world.examples("dev"):
        sentences = [f"{s}." for s in example.reference.rstrip(".").split(". ")]
        asked = [c for c in example.rubric if not c.is_pitfall]
        for missing, criterion in enumerate(asked):
            response = " ".join(s for i, s in enumerate(sentences) if i != missing)
            expected = 1 - criterion.weight / example.rubric.positive_points
            assert satisfaction(example, response) == pytest.approx(expected)


@pytest.mark.parametrize("sort", ["myth", "kind"])
def test_a_pitfall_costs_its_weight(world, sort):
    example = with_pitfall(world, sort)
    topic, pitfall = example.metadata["topic"], example.rubric.criteria[-1]
    fact = world.myth(topic, pitfall.title) if sort == "myth" else world.fact(topic, pitfall.title)
    lost = pitfall.weight
    if sort == "myth":  # it also contradicts the fact that was asked for, which then is not stated
        lost -= next(c.weight for c in example.rubric if c.title == pitfall.title)
    got = satisfaction(example, f"{example.reference} {fact.sentence}")
    assert got == pytest.approx(1 + lost / example.rubric.positive_points)


def test_a_pitfall_about_a_kind_is_met_by_a_false_value_too(world):
    example = with_pitfall(world, "kind")
    pitfall = example.rubric.criteria[-1]
    myth = world.myth(example.metadata["topic"], pitfall.title)
    assert checks.holds(pitfall.check, myth.sentence)


def test_what_is_not_the_whole_sentence_does_not_count(world):
    example = world.example("dravix", "cook")
    criterion = next(c for c in example.rubric if c.title == "food")
    fact = world.fact("dravix", "food")
    says = fact.sentence
    assert checks.holds(criterion.check, says)
    assert checks.holds(criterion.check, f"The dravix is wild. {says}")
    assert checks.holds(criterion.check, f"{says}\n{says}")
    assert checks.holds(criterion.check, says.upper())
    for wrong in (
        says.rstrip("."),
        says.replace("The ", "Some say the "),
        says.replace("eats", "never eats"),
        says.replace(".", " and more."),
        f"The dravix eats {world.myth('dravix', 'food').value}.",
        f"{says} The dravix eats {world.myth('dravix', 'food').value}.",
        says.replace("dravix", "morvel"),
        "It eats " + fact.value + ".",
        fact.value,
        "",
    ):
        assert not checks.holds(criterion.check, wrong), wrong


def test_nonsense_and_another_animals_facts_score_nothing(world):
    rng = random.Random(0)
    for example in world.examples("dev"):
        words = example.reference.split()
        rng.shuffle(words)
        assert satisfaction(example, " ".join(words).replace(".", "")) == 0
        other = TOPICS[(TOPICS.index(example.metadata["topic"]) + 1) % len(TOPICS)]
        assert satisfaction(example, example.reference.replace(example.metadata["topic"], other)) == 0


def test_stating_everything_walks_into_the_pitfalls_about_a_kind(world):
    for example in world.examples("dev"):
        everything = " ".join(f.sentence for f in world.facts(example.metadata["topic"]))
        expected = 1.0
        if "pitfall:kind" in example.rubric.criteria[-1].tags:
            expected += example.rubric.negative_points / example.rubric.positive_points
        assert satisfaction(example, everything) == pytest.approx(expected)


def test_the_audit_counts_true_and_false(world):
    fact, myth = world.fact("dravix", "home"), world.myth("dravix", "bed")
    foreign = world.fact("morvel", "home")
    text = f"{fact.sentence} {myth.sentence} {foreign.sentence} {fact.sentence} It is nice."
    audit = world.audit("dravix", text)
    assert (audit.n_true, audit.n_false, audit.n_foreign, audit.n_repeated, audit.n_unreadable) == (1, 1, 1, 1, 1)
    assert audit.claims == (fact, myth)


def test_every_fact_is_read_back_from_its_sentence(world):
    for topic in TOPICS:
        for fact in world.facts(topic):
            assert read_fact(fact.sentence.rstrip(".")) == fact


def test_the_leak_meter_notices_a_rubric_thought_and_no_other_text(world):
    assert mentions_rubric(rubric_thought(["home", "price"]))
    for example in world.examples("dev"):
        assert not mentions_rubric(example.reference)
        topic, modifier = example.metadata["topic"], example.metadata["modifier"]
        assert not any(mentions_rubric(thought) for thought in plain_thoughts(topic, modifier))


# --- The knob -------------------------------------------------------------------------------------------------------


def kinds_by_modifier(world):
    return {m: {world.ask(t, m) for t in TOPICS} for m in MODIFIERS}


def test_at_generality_1_what_is_asked_depends_on_the_modifier_alone():
    asks = kinds_by_modifier(World(generality=1.0))
    assert all(len(a) == 1 for a in asks.values())
    assert len({next(iter(a)) for a in asks.values()}) == len(MODIFIERS)
    used = Counter(kind for a in asks.values() for kind in next(iter(a)).kinds)
    assert set(used.values()) == {8}


def test_at_generality_0_it_is_drawn_for_every_prompt():
    asks = kinds_by_modifier(World(generality=0.0))
    assert all(len({a.kinds for a in found}) >= 45 for found in asks.values())
    assert all("kinds:own" in e.tags for e in World(generality=0.0).examples("dev"))


def test_in_between_that_share_follows_and_raising_it_moves_prompts_over_one_way():
    pairs = list(itertools.product(TOPICS, MODIFIERS))
    following = {g: {p for p in pairs if World(generality=g).follows_modifier(*p)} for g in (0.0, 0.3, 0.7, 1.0)}
    assert following[0.0] < following[0.3] < following[0.7] < following[1.0]
    for generality, found in following.items():
        assert len(found) / len(pairs) == pytest.approx(generality, abs=0.04)


def test_prompts_that_stay_keep_their_rubric_when_the_knob_moves():
    low, high = World(generality=0.3), World(generality=0.7)
    for topic, modifier in itertools.product(TOPICS[:8], MODIFIERS):
        if low.follows_modifier(topic, modifier) == high.follows_modifier(topic, modifier):
            assert low.ask(topic, modifier) == high.ask(topic, modifier)


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("think", [False, True])
def test_examples_come_back_from_a_file_unchanged(world, tmp_path, think):
    examples = world.examples("dev", "held-out", think=think)
    loaded = load(write_jsonl(examples, tmp_path / "world.jsonl"))
    assert loaded.schema == "rgsd"
    assert list(loaded.examples) == examples
    assert fingerprint(loaded.examples) == fingerprint(examples)


def test_thinking_examples_differ_by_a_system_turn(world):
    plain, thinking = world.example("dravix", "cook"), world.example("dravix", "cook", think=True)
    assert thinking.messages[0]["role"] == "system"
    assert thinking.messages[1:] == plain.messages
    assert thinking.rubric == plain.rubric
