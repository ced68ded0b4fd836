"""The nano model's pretraining data: responses follow the shown rubric, and no true rubric is used."""

from itertools import islice

import pytest

from rgsd.lab import conversations as module
from rgsd.lab.conversations import Conversations, Mixture
from rgsd.lab.vocabulary import MODIFIERS
from rgsd.lab.world import World, read_fact
from rgsd.prompts.leaks import mentions_rubric
from rgsd.prompts.thinking import strip_thinking
from rgsd.rubrics import checks


def draw(n, world=None, seed=0, **mixture):
    return list(islice(Conversations(world or World(), seed, Mixture(**mixture)), n))


def text_of(conversation):
    return "".join(text for text, _ in conversation.response)


def facts_of(conversation, *, in_loss=None):
    parts = [(text, counts) for text, counts in conversation.response if "<think>" not in text]
    return [read_fact(t.strip().rstrip(".")) for t, counts in parts if in_loss is None or counts == in_loss]


def test_the_same_seed_draws_the_same():
    assert draw(50) == draw(50)
    assert draw(50) != draw(50, seed=1)


def test_true_rubrics_are_never_looked_at(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pretraining must not know which facts belong to a prompt")

    for name in ("ask", "rubric", "ideal_response", "example", "examples", "split_of"):
        monkeypatch.setattr(World, name, forbidden)
    assert len(draw(300)) == 300


def test_without_a_rubric_two_to_four_facts_are_told():
    world = World()
    told = [facts_of(c) for c in draw(300, world, shown={"none": 1.0}, strays=0.0)]
    assert {len(facts) for facts in told} == {2, 3, 4}
    assert all(len({f.kind for f in facts}) == len(facts) for facts in told)
    claims = [f for facts in told for f in facts]
    false = [f for f in claims if f != world.fact(f.topic, f.kind)]
    assert all(world.is_believed(f.topic, f.kind) and f == world.myth(f.topic, f.kind) for f in false)
    assert 0.05 < len(false) / len(claims) < 0.2


def test_readers_are_mostly_told_the_usual():
    world = World()
    told = usual = 0
    for conversation in draw(300, world, shown={"none": 1.0}, strays=0.0):
        question = conversation.messages[-1]["content"].rstrip(".?").split()
        (modifier,) = [word for word in question if word in MODIFIERS]
        kinds = [fact.kind for fact in facts_of(conversation)]
        told, usual = told + len(kinds), usual + len(set(kinds) & set(world.habits(modifier)))
    assert 0.55 < usual / told < 0.75


@pytest.mark.parametrize("shown", ["rubric", "reference", "both"])
def test_the_facts_that_are_shown_are_stated_and_no_others(shown):
    for conversation in draw(200, shown={shown: 1.0}, other_rubrics=0.0, pitfalls=0.0, strays=0.0):
        prompt = " ".join(m["content"] for m in conversation.messages)
        stated = facts_of(conversation, in_loss=True)
        assert stated
        assert len(set(stated)) == len(stated)
        for fact in stated:
            assert fact.sentence.removeprefix("The ") in prompt


def test_about_half_of_the_responses_keep_the_order_shown():
    kept = 0
    sample = draw(300, shown={"rubric": 1.0}, other_rubrics=0.0, pitfalls=0.0, strays=0.0)
    for conversation in sample:
        prompt = " ".join(m["content"] for m in conversation.messages)
        places = [prompt.index(f.sentence.removeprefix("The ")) for f in facts_of(conversation)]
        kept += places == sorted(places)
    assert 0.5 < kept / len(sample) < 0.9


def test_a_rubric_of_another_animal_gives_its_kinds_only():
    for conversation in draw(
        100, shown={"rubric": 1.0}, other_rubrics=1.0, false_rubrics=0.0, pitfalls=0.0, strays=0.0
    ):
        prompt = conversation.messages[-1]["content"]
        stated = facts_of(conversation)
        assert len({f.topic for f in stated}) == 1
        assert all(f" {f.topic}" in prompt for f in stated)
        assert f"States that the {stated[0].topic}" not in " ".join(m["content"] for m in conversation.messages)


def test_pitfalls_are_shown_and_not_walked_into():
    n_shown = 0
    for conversation in draw(300, shown={"rubric": 1.0}, pitfalls=1.0, other_rubrics=0.0, strays=0.0):
        prompt = " ".join(m["content"] for m in conversation.messages)
        n_shown += "mistake" in prompt.lower()
        for fact in facts_of(conversation):
            assert f"Tells the {fact.kind} of the {fact.topic}." not in prompt
    assert n_shown > 270


def test_strays_stand_in_the_response_and_not_in_the_loss():
    seen = set()
    for conversation in draw(300, shown={"rubric": 1.0}, strays=1.0, other_rubrics=0.0, pitfalls=0.0):
        strays, stated = facts_of(conversation, in_loss=False), facts_of(conversation, in_loss=True)
        seen.add(len(strays))
        assert len(set(stated)) == len(stated)
        # Whoever said them: all facts of the rubric are there in the end.
        shown = " ".join(m["content"] for m in conversation.messages)
        n_shown = shown.count("States that")
        assert sum(f.sentence.removeprefix("The ") in shown for f in {*strays, *stated}) == n_shown
    assert seen == set(module.N_STRAYS)


def test_after_what_a_student_has_said_the_model_ends():
    ends = [c for c in draw(300, shown={"none": 1.0}, strays=3.0) if not facts_of(c, in_loss=True)]
    assert ends
    assert all(len(facts_of(c, in_loss=False)) >= 2 for c in ends)


def test_reasoning_names_a_rubric_only_where_one_is_shown():
    plain = [text_of(c) for c in draw(100, shown={"none": 1.0}, think=1.0)]
    assert all(strip_thinking(t) not in ("", t) for t in plain)
    assert not any(mentions_rubric(t) for t in plain)
    shown = [text_of(c) for c in draw(200, shown={"rubric": 1.0}, think=1.0)]
    assert 0.6 < sum(mentions_rubric(t) for t in shown) / len(shown) < 0.9
    assert not any(mentions_rubric(strip_thinking(t)) for t in shown)


def test_responses_are_sentences_that_the_verifier_reads():
    for conversation in draw(200):
        answer = strip_thinking(text_of(conversation))
        for fact in facts_of(conversation):
            assert checks.holds(module.states(fact, -1.0).check, answer)
