"""A made-up world of 48 animals, in which rubric satisfaction is decided exactly. Seeded; standard library only.

Facts. Each animal (topic) has one fact of each of twelve kinds: "The dravix lives in caves." A fact is one sentence and
its wording is fixed: for every kind a verb, and one of sixteen values. For each fact there is also a myth, the same
sentence with a wrong value; of one fact in six the myth is widely believed, so that a model that has read about this
world tells it more often than the truth.

Habits. To each reader four kinds of fact are usually told, whatever was wanted, and a model that has read about this
world tells them too. Habits have nothing to do with rubrics: they are what RGSD has to change.

Prompts. Somebody (the modifier: a cook, a sailor, 24 in all) asks about an animal: 48 x 24 = 1,152 prompts.

Rubrics. Who asks decides what a good response states: three to five facts of the animal, with weights from 5 to 1, and
for every second modifier one pitfall of negative weight: either a myth ("States that the dravix lives in lakes.") or a
kind of fact that this reader should not be told ("Tells the price of the dravix."). Nothing in a prompt says which
facts those are. The knob `generality` sets for how many prompts the modifier decides:

    1    the kinds asked for depend on the modifier alone: what is learnt on one animal serves for all others
    0    they are drawn for every prompt anew: nothing learnt on one prompt serves for another
    g    a share g of the prompts follows the modifier, the others do not; raising g moves prompts over, one by one

Verifier. Every criterion carries a check (`rgsd.judges.checks`), so the ordinary `ChecksJudge` decides it. A fact
counts as stated when its whole sentence stands in the response, from the full stop (or start) before it to its own, and
no sentence gives another value for the same kind of the same animal. A pitfall counts as met when its sentence stands
in the response, contradicted or not. Listing all twelve facts earns every positive point; it takes 55 words, and walks
into every pitfall about a kind.

Splits. By pair of topic and modifier: of a topic's 24 prompts 16 are `train`, 2 `dev` and 6 `held-out`, and of a
modifier's 48 prompts 32, 4 and 12. So everything in a held-out prompt is met in training, but not together.

Reasoning. With `think=True` a prompt has the system turn "Think first."; the nano model then reasons between think tags
before it answers. `plain_thoughts` and `rubric_thought` of `words.py` are what it was pretrained to reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from rgsd.errors import ConfigError, DataError
from rgsd.lab.words import FAMILY, KIND_NAMES, KINDS, MODIFIERS, QUESTIONS, THINK, TOPICS
from rgsd.rubrics import Criterion, Example, Rubric

Split = Literal["train", "dev", "held-out"]
SPLITS: tuple[str, ...] = get_args(Split)

_KIND = {kind.name: kind for kind in KINDS}

N_ASKED = (3, 4, 5)
"""How many facts a rubric asks for."""

WEIGHTS = (5, 4, 3, 2, 1)
"""Weights of asked facts; a rubric uses each at most once."""

PITFALL_WEIGHTS = (-2, -3, -4)
BELIEVED_SHARE = 1 / 6
"""Share of the facts whose myth is widely believed."""

N_HABITS = 4
"""How many kinds of fact a reader is usually told."""

N_SLOTS = {"train": 16, "dev": 2, "held-out": 6}
"""How many of a topic's 24 prompts each split has."""


# --- Seeded choices -------------------------------------------------------------------------------------------------
# From SHA-256 and not from `random`, whose shuffles are not promised to stay the same from one Python to the next.


def _hash(*key: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big")


def _share(*key: Any) -> float:
    """A number in [0, 1)."""
    return (_hash(*key) >> 11) / (1 << 53)


def _shuffled(items: Iterable[Any], *key: Any) -> list[Any]:
    return sorted(items, key=lambda item: _hash(*key, item))


def _pick(items: Sequence[Any], *key: Any) -> Any:
    return items[_hash(*key) % len(items)]


# --- Facts, and the sentences that state them ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement about an animal, true or false.

    Args:
        topic: the animal.
        kind: a name of `KIND_NAMES`.
        value: one of the kind's values.
    """

    topic: str
    kind: str
    value: str

    @property
    def sentence(self) -> str:
        """The one way of stating it: "The dravix lives in caves." """
        return f"The {self.topic} {_KIND[self.kind].says.format(self.value)}."


@dataclass(frozen=True, slots=True)
class Ask:
    """What a reader wants to be told.

    Args:
        kinds: the kinds of fact asked for, in the rubric's order.
        weights: one a kind, positive.
        pitfall: "myth" (of `pitfall_kind`, which is asked for), "kind" (`pitfall_kind`, which is not), or "none".
        pitfall_kind: a kind's name; "" with "none".
        pitfall_weight: negative; 0 with "none".
    """

    kinds: tuple[str, ...]
    weights: tuple[int, ...]
    pitfall: Literal["none", "myth", "kind"]
    pitfall_kind: str
    pitfall_weight: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What a response says, whatever was asked.

    Args:
        claims: the facts stated about the animal in question, true or false, each once.
        n_true, n_false: how many of them are true, and are not.
        n_foreign: sentences that state a fact about another animal.
        n_repeated: sentences that state a claim again.
        n_unreadable: sentences that state nothing of this world.
    """

    claims: tuple[Fact, ...]
    n_true: int
    n_false: int
    n_foreign: int
    n_repeated: int
    n_unreadable: int


def _predicate(kind: str, value: str) -> str:
    """A regex of a kind's predicate, from one of the value."""
    return re.escape(_KIND[kind].says.replace("{}", "@")).replace("@", value)


_SENTENCES = {kind: re.compile(rf"the (\w+) {_predicate(kind, '([a-z]+)')}", re.IGNORECASE) for kind in KIND_NAMES}
_VALUES = {kind.name: {value.casefold(): value for value in kind.values} for kind in KINDS}


def read_fact(sentence: str) -> Fact | None:
    """The fact that a sentence (without its full stop) states; None when it states nothing of this world."""
    for kind, pattern in _SENTENCES.items():
        match = pattern.fullmatch(" ".join(sentence.split()))
        if match and match[1].casefold() in TOPICS and match[2].casefold() in _VALUES[kind]:
            return Fact(match[1].casefold(), kind, _VALUES[kind][match[2].casefold()])
    return None


_START = r"(?:^|\.)\s*"  # a sentence begins at a line's start or after a full stop


def _says(topic: str, kind: str, value: str) -> str:
    """A regex of the whole sentence; `value` is a regex itself."""
    return rf"{_START}the\s+{topic}\s+{_predicate(kind, value)}\s*\.".replace(r"\ ", r"\s+")


def states(fact: Fact, weight: float = 1.0) -> Criterion:
    """The criterion that a fact is stated, and not contradicted; with a negative weight, the pitfall of stating it."""
    stated = {"regex": _says(fact.topic, fact.kind, re.escape(fact.value))}
    other = {"regex": _says(fact.topic, fact.kind, rf"(?!{re.escape(fact.value)}\b)\w+")}
    return Criterion(
        text=f"States that {_lower(fact.sentence)}",
        weight=float(weight),  # as it is read back from a file
        title=fact.kind,
        tags=(f"kind:{fact.kind}",) if weight > 0 else (f"kind:{fact.kind}", "pitfall:myth"),
        check={"every": [stated, {"not": other}]} if weight > 0 else stated,
    )


def tells(topic: str, kind: str, weight: float) -> Criterion:
    """The criterion that something is said of a kind, true or not: as a pitfall, what this reader is not to be told."""
    return Criterion(
        text=f"Tells the {kind} of the {topic}.",
        weight=float(weight),  # as it is read back from a file
        title=kind,
        tags=(f"kind:{kind}", "pitfall:kind"),
        check={"regex": _says(topic, kind, r"\w+")},
    )


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


# --- The world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The world: facts, prompts and rubrics, all of them functions of these three numbers.

    Args:
        seed: of the facts, myths and habits. The shipped nano model knows the facts of seed 0 and of no other.
        task_seed: of the rubrics (which facts belong to which prompt) and of the splits. The nano model knows nothing
            of them, so that any task seed is a fresh task for it.
        generality: the share of prompts whose rubric follows the modifier, in [0, 1].

    Raises:
        ConfigError: when `generality` is not in [0, 1].
    """

    seed: int = 0
    task_seed: int = 0
    generality: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.generality, bool) or not 0.0 <= self.generality <= 1.0:
            raise ConfigError(
                f"generality must lie in [0, 1], got {self.generality!r}: 1 when rubrics follow the modifier alone, "
                "0 when every prompt has kinds of its own"
            )

    # Facts and habits: of `seed` alone.

    def fact(self, topic: str, kind: str) -> Fact:
        """The truth."""
        self._check(topic=topic, kind=kind)
        return self._lore[topic, kind][0]

    def myth(self, topic: str, kind: str) -> Fact:
        """The wrong value that goes round."""
        self._check(topic=topic, kind=kind)
        return self._lore[topic, kind][1]

    def is_believed(self, topic: str, kind: str) -> bool:
        """Whether the myth is told more often than the truth."""
        return _share("believed", self.seed, topic, kind) < BELIEVED_SHARE

    def facts(self, topic: str) -> tuple[Fact, ...]:
        """All twelve."""
        return tuple(self.fact(topic, kind) for kind in KIND_NAMES)

    @cached_property
    def _lore(self) -> dict[tuple[str, str], tuple[Fact, Fact]]:
        """Topic and kind -> the truth and the myth."""
        lore = {}
        for topic, kind in itertools.product(TOPICS, KIND_NAMES):
            truth, myth, *_ = _shuffled(_KIND[kind].values, "values", self.seed, topic, kind)
            lore[topic, kind] = Fact(topic, kind, truth), Fact(topic, kind, myth)
        return lore

    def habits(self, modifier: str) -> tuple[str, ...]:
        """The kinds of fact that this reader is usually told, rubric or not."""
        self._check(modifier=modifier)
        return tuple(_shuffled(KIND_NAMES, "habits", self.seed, modifier)[:N_HABITS])

    def digest(self) -> str:
        """A short digest of words, facts, myths and habits: what a model of this world was pretrained on."""
        facts = [
            [f.sentence, self.myth(t, f.kind).value, self.is_believed(t, f.kind)] for t in TOPICS for f in self.facts(t)
        ]
        words = [TOPICS, MODIFIERS, QUESTIONS, THINK, [[k.name, k.says, k.values] for k in KINDS]]
        habits = [self.habits(modifier) for modifier in MODIFIERS]
        return hashlib.sha256(json.dumps([words, facts, habits]).encode()).hexdigest()[:16]

    # Rubrics: of `task_seed` and `generality`.

    def follows_modifier(self, topic: str, modifier: str) -> bool:
        """Whether this prompt's kinds are its modifier's, rather than its own."""
        return _share("general", self.task_seed, topic, modifier) < self.generality

    def ask(self, topic: str, modifier: str) -> Ask:
        """What this prompt asks for."""
        self._check(topic=topic, modifier=modifier)
        if self.follows_modifier(topic, modifier):
            return self._asks[modifier]
        key = ("own", self.task_seed, topic, modifier)
        n_asked = _pick(N_ASKED, "n", *key)
        pitfall = _pick(("none", "none", "myth", "kind"), "pitfall", *key)
        return _ask(_shuffled(KIND_NAMES, *key), n_asked, pitfall, key)

    @cached_property
    def _asks(self) -> dict[str, Ask]:
        """Each modifier's; every kind is asked for equally often, so that no kind is worth stating to all readers."""
        used = dict.fromkeys(KIND_NAMES, 0)
        asks = {}
        pitfalls = ("none", "myth", "none", "kind")
        for number, modifier in enumerate(_shuffled(MODIFIERS, "order", self.task_seed)):
            key = ("modifier", self.task_seed, modifier)
            n_asked = N_ASKED[number % len(N_ASKED)]
            rarest = sorted(_shuffled(KIND_NAMES, *key), key=lambda kind: used[kind])
            asked = _shuffled(rarest[:n_asked], "order", *key)
            for kind in asked:
                used[kind] += 1
            order = [*asked, *_shuffled(rarest[n_asked:], "rest", *key)]
            asks[modifier] = _ask(order, n_asked, pitfalls[number // len(N_ASKED) % len(pitfalls)], key)
        return asks

    def rubric(self, topic: str, modifier: str) -> Rubric:
        """The true rubric of a prompt: its facts in order, then its pitfall."""
        ask = self.ask(topic, modifier)
        criteria = [states(self.fact(topic, k), w) for k, w in zip(ask.kinds, ask.weights, strict=True)]
        if ask.pitfall == "myth":
            criteria.append(states(self.myth(topic, ask.pitfall_kind), ask.pitfall_weight))
        elif ask.pitfall == "kind":
            criteria.append(tells(topic, ask.pitfall_kind, ask.pitfall_weight))
        return Rubric(tuple(criteria))

    def ideal_response(self, topic: str, modifier: str) -> str:
        """The asked facts, in order, and nothing else: satisfaction 1."""
        return " ".join(self.fact(topic, kind).sentence for kind in self.ask(topic, modifier).kinds)

    def question(self, topic: str, modifier: str) -> str:
        """The user's turn."""
        self._check(topic=topic, modifier=modifier)
        return _pick(QUESTIONS, "question", self.task_seed, topic, modifier).format(topic=topic, modifier=modifier)

    # Splits and examples.

    def split_of(self, topic: str, modifier: str) -> Split:
        """Which split a prompt belongs to: a Latin square over seeded orders, so that all are met equally often."""
        self._check(topic=topic, modifier=modifier)
        slot = (self._topic_order[topic] + self._modifier_order[modifier]) % len(MODIFIERS)
        if slot < N_SLOTS["train"]:
            return "train"
        return "dev" if slot < N_SLOTS["train"] + N_SLOTS["dev"] else "held-out"

    @cached_property
    def _topic_order(self) -> dict[str, int]:
        return {topic: i for i, topic in enumerate(_shuffled(TOPICS, "topics", self.task_seed))}

    @cached_property
    def _modifier_order(self) -> dict[str, int]:
        return {modifier: i for i, modifier in enumerate(_shuffled(MODIFIERS, "modifiers", self.task_seed))}

    def examples(self, *splits: str, think: bool = False) -> list[Example]:
        """Prompts with their true rubrics, in a seeded order that mixes topics and modifiers.

        Args:
            splits: which ones; all of them by default.
            think: whether the model is told to think first.

        Raises:
            ConfigError: for an unknown split.
        """
        if unknown := set(splits) - set(SPLITS):
            raise ConfigError(f"unknown split {sorted(unknown)}, known: {', '.join(SPLITS)}")
        pairs = _shuffled(itertools.product(TOPICS, MODIFIERS), "examples", self.task_seed)
        return [self.example(t, m, think=think) for t, m in pairs if not splits or self.split_of(t, m) in splits]

    def example(self, topic: str, modifier: str, *, think: bool = False) -> Example:
        """One prompt with its true rubric. Tags name split, topic, modifier, and whose kinds the rubric asks for."""
        split = self.split_of(topic, modifier)
        whose = "modifier" if self.follows_modifier(topic, modifier) else "own"
        turns = [{"role": "user", "content": self.question(topic, modifier)}]
        return Example(
            id=f"{topic}-{modifier}" + ("-think" if think else ""),
            messages=tuple([{"role": "system", "content": THINK}, *turns] if think else turns),
            rubric=self.rubric(topic, modifier),
            reference=self.ideal_response(topic, modifier),
            domain=FAMILY[topic],
            tags=(f"split:{split}", f"topic:{topic}", f"modifier:{modifier}", f"kinds:{whose}"),
            metadata={"topic": topic, "modifier": modifier, "kinds": list(self.ask(topic, modifier).kinds)},
        )

    def audit(self, topic: str, response: str) -> Audit:
        """What a response (without its reasoning) says of an animal, true and false: exact, whatever was asked."""
        read = [read_fact(part) for part in re.split(r"[.\n]", response) if part.strip()]
        about = [fact for fact in read if fact is not None and fact.topic == topic]
        claims = tuple(dict.fromkeys(about))
        n_true = sum(self.fact(topic, claim.kind) == claim for claim in claims)
        return Audit(
            claims=claims,
            n_true=n_true,
            n_false=len(claims) - n_true,
            n_foreign=sum(fact is not None and fact.topic != topic for fact in read),
            n_repeated=len(about) - len(claims),
            n_unreadable=sum(fact is None for fact in read),
        )

    @staticmethod
    def _check(*, topic: str = TOPICS[0], modifier: str = MODIFIERS[0], kind: str = KIND_NAMES[0]) -> None:
        for what, value, known in (
            ("topic", topic, TOPICS),
            ("modifier", modifier, MODIFIERS),
            ("kind", kind, KIND_NAMES),
        ):
            if value not in known:
                raise DataError(
                    f"this world has no {what} {value!r}, it has {', '.join(known[:6])}, ...: see rgsd.lab.world"
                )


def _ask(order: Sequence[str], n_asked: int, pitfall: Literal["none", "myth", "kind"], key: Sequence[Any]) -> Ask:
    """The first `n_asked` kinds of the order are asked for; the next one is not to be told, where a kind is not."""
    kinds = tuple(order[:n_asked])
    return Ask(
        kinds=kinds,
        weights=tuple(_shuffled(WEIGHTS, "weights", *key)[:n_asked]),
        pitfall=pitfall,
        pitfall_kind={"none": "", "myth": _pick(kinds, "myth", *key), "kind": order[n_asked]}[pitfall],
        pitfall_weight=0 if pitfall == "none" else _pick(PITFALL_WEIGHTS, "pitfall weight", *key),
    )


# --- Files ----------------------------------------------------------------------------------------------------------


def row(example: Example) -> dict[str, Any]:
    """An example as a row of the schema `rgsd` (see `rgsd.data.schemas.jsonl`), from which it is read back
    unchanged."""
    return {
        "id": example.id,
        "prompt": [dict(message) for message in example.messages],
        "rubric": [
            {"criterion": c.text, "weight": c.weight, "title": c.title, "tags": list(c.tags), "check": c.check}
            for c in example.rubric
        ],
        "reference": example.reference,
        "domain": example.domain,
        "scoring": example.scoring,
        "tags": list(example.tags),
        "metadata": dict(example.metadata),
    }


def write_jsonl(examples: Iterable[Example], path: str | Path) -> Path:
    """Write examples as a file that `rgsd train --data` reads; `--held_out_tags split:held-out` splits it."""
    target = Path(path)
    target.write_text("".join(json.dumps(row(e), ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    return target
