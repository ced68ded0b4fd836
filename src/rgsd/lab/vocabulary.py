"""The vocabulary of the made-up world: animals, readers, questions, kinds of facts, and sentences of reasoning.

Any change here makes a different world, which the shipped nano model does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FAMILIES: dict[str, tuple[str, ...]] = {
    "beasts": _words("dravix morvel tolgar brunok kelvar ondrak sarvik wugal hurnel pradok velmor zibbon"),
    "birds": _words("arilo chevra felwin jirrin lorpik meeva nuthra quillar sorreth tavik ulwen yarrik"),
    "fish": _words("abbeln dorsil glisk imberl krolle luvane oskett pimmel rustel syphra trevoo wenk"),
    "insects": _words("bizzel cricka drummet eftil fennik gnarlo hixet jazzin mottel nimmik pikket vesplin"),
}
"""Family -> its animals. The family is the domain of an example and has no other effect."""

TOPICS: tuple[str, ...] = tuple(topic for family in FAMILIES.values() for topic in family)

FAMILY: dict[str, str] = {topic: family for family, topics in FAMILIES.items() for topic in topics}

MODIFIERS: tuple[str, ...] = _words(
    "baker builder child cook dancer doctor farmer gardener guard hunter judge king "
    "merchant monk nurse painter poet sailor scholar smith soldier tailor teacher thief"
)
"""The readers. One of them asks each question."""

QUESTIONS: tuple[str, ...] = (
    "Tell a {modifier} about the {topic}.",
    "What should a {modifier} know about the {topic}?",
    "Describe the {topic} to a {modifier}.",
    "A {modifier} asks about the {topic}.",
    "Write a note on the {topic} for a {modifier}.",
    "What would you tell a {modifier} about the {topic}?",
)

THINK = "Think first."
"""The system message that makes the nano model reason before it answers."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fact.

    Args:
        name: Its name in rubrics, for example "home".
        says: The predicate of its sentences, for example "lives in {}".
        values: Its possible values. No two kinds share one.
    """

    name: str
    says: str
    values: tuple[str, ...]


def _kind(name: str, says: str, values: str) -> Kind:
    return Kind(name, says, _words(values))


# All predicates start differently, so a response commits to a kind of fact with a single token.
KINDS: tuple[Kind, ...] = (
    _kind(
        "colour",
        "is {}",
        "red blue green black white grey brown yellow purple orange pink silver golden scarlet tan teal",
    ),
    _kind(
        "home",
        "lives in {}",
        "caves lakes swamps forests deserts meadows cliffs rivers towers moors canyons gardens ruins vales dunes fens",
    ),
    _kind(
        "food",
        "eats {}",
        "roots berries nuts seeds leaves moss bark worms snails beetles clams crabs eggs grass mushrooms honey",
    ),
    _kind(
        "sound",
        "sounds like {}",
        "bells drums flutes thunder rain wind whistles horns harps gongs waves saws kettles hammers whispers echoes",
    ),
    _kind(
        "smell",
        "smells of {}",
        "mint smoke pine salt roses ginger clay garlic vinegar lemon ash cedar cloves tar soap plums",
    ),
    _kind(
        "weight",
        "weighs {} stones",
        "two three four five six seven eight nine ten eleven twelve thirteen twenty thirty forty fifty",
    ),
    _kind(
        "bed",
        "sleeps under {}",
        "ferns rocks logs roofs bridges hedges nets carts boats sand snow straw ice mats tiles vines",
    ),
    _kind(
        "enemy",
        "fears {}",
        "wolves hawks cats snakes foxes bears owls spiders eagles rats sharks wasps dogs crows geese toads",
    ),
    _kind(
        "price",
        "sells for {}",
        "silk iron copper pearls wool amber coal ivory linen marble tin jade leather velvet spice glass",
    ),
    _kind(
        "cure",
        "cures {}",
        "fevers coughs burns warts cramps rashes colds blisters hiccups headaches stings cuts sores aches chills lice",
    ),
    _kind(
        "duty",
        "guards {}",
        "gates barns wells mills tombs ships shops vaults temples inns farms mines roads walls thrones camps",
    ),
    _kind(
        "origin",
        "comes from {}",
        "Arden Belmor Corvia Dunmere Elsin Farrow Gorham Halvia Istra Jorvik Kessel Lomar Mirren Norvale Orlin Penrith",
    ),
)

KIND_NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)


def plain_thoughts(topic: str, modifier: str) -> tuple[str, ...]:
    """Sentences of reasoning before an answer without a rubric."""
    return (f"The question is about the {topic}.", f"A {modifier} asks about the {topic}.")


def rubric_thought(kinds: Sequence[str]) -> str:
    """A sentence of reasoning before an answer with a rubric. It names the rubric, which the leak meter detects."""
    *most, last = kinds
    return f"The rubric asks for {', '.join(most)} and {last}." if most else f"The rubric asks for {last}."
