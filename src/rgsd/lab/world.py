"""A world of 48 invented animals, where rubric satisfaction has an exact answer. Uses only the standard library.

Facts. Each animal (topic) has one fact of each of twelve kinds: "The dravix lives in caves." A fact is one sentence
with fixed wording: a predicate for its kind and one of sixteen values. Each fact has a myth, the same sentence with a
wrong value. One myth in six is widely believed: a model that has read about this world states it more often than the
truth.

Habits. Each reader is usually told four kinds of facts, whatever they want to know. A model that has read about this
world has the same habits. They are unrelated to the rubrics, and RGSD has to change them.

Prompts. One of 24 readers (the modifier: a cook, a sailor, ...) asks about an animal, which gives 48 x 24 = 1,152
prompts.

Rubrics. The reader decides what a good response states: three to five facts about the animal, with weights from 5 to
1. For every second modifier there is one pitfall of negative weight: either a myth ("States that the dravix lives in
lakes.") or a kind of fact that this reader should not be told ("Tells the price of the dravix."). The prompt does not
reveal any of this. `generality` sets the share of prompts whose rubric follows the modifier:

    1    The kinds of facts depend only on the modifier, so training on one animal generalizes to all others.
    0    The kinds of facts are drawn for each prompt, so training on one prompt teaches nothing about another.
    g    A share g of the prompts follows the modifier. A larger g only adds prompts to that share.

Verifier. Every criterion has a check (`rgsd.rubrics.checks`), which `ChecksJudge` decides. A fact counts as
stated if its whole sentence is in the response and no sentence gives another value for the same kind of fact about the
same animal. A pitfall counts as met if its sentence is in the response, contradicted or not. A response that lists all
twelve facts earns every positive point, but takes 55 words and meets every pitfall about a kind of fact.

Splits. Prompts are split by topic and modifier: each topic has 16 `train`, 2 `dev` and 6 `held-out` prompts, and each
modifier 32, 4 and 12. Every topic and every modifier of a held-out prompt occurs in training, but not together.

Reasoning. With `think=True`, the prompt has the system message "Think first.", and the nano model reasons between think
tags before it answers. It was pretrained on the sentences of `plain_thoughts` and `rubric_thought`.
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
from rgsd.lab.vocabulary import FAMILY, KIND_NAMES, KINDS, MODIFIERS, QUESTIONS, THINK, TOPICS
from rgsd.rubrics import Criterion, Example, Rubric

Split = Literal["train", "dev", "held-out"]
SPLITS: tuple[str, ...] = get_args(Split)

_KIND = {kind.name: kind for kind in KINDS}

N_ASKED = (3, 4, 5)
"""Possible numbers of facts that a rubric asks for."""

WEIGHTS = (5, 4, 3, 2, 1)
"""Weights of the facts. A rubric uses each at most once."""

PITFALL_WEIGHTS = (-2, -3, -4)
BELIEVED_SHARE = 1 / 6
"""Share of the myths that are widely believed."""

N_HABITS = 4
"""Number of kinds of facts that a reader is usually told."""

N_SLOTS = {"train": 16, "dev": 2, "held-out": 6}
"""Prompts per topic in each split."""


# --- Seeded choices -------------------------------------------------------------------------------------------------
# From SHA-256 instead of `random`, because Python versions do not guarantee the same shuffles.


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
        topic: The animal.
        kind: One of `KIND_NAMES`.
        value: One of the kind's values.
    """

    topic: str
    kind: str
    value: str

    @property
    def sentence(self) -> str:
        """The only sentence that states it, for example "The dravix lives in caves." """
        return f"The {self.topic} {_KIND[self.kind].says.format(self.value)}."


@dataclass(frozen=True, slots=True)
class Ask:
    """What a reader wants to know.

    Args:
        kinds: The kinds of facts asked for, in the rubric's order.
        weights: Their weights, all positive.
        pitfall: "myth" (of `pitfall_kind`, which is asked for), "kind" (any fact of `pitfall_kind`, which is not asked
            for), or "none".
        pitfall_kind: The pitfall's kind of fact; "" without a pitfall.
        pitfall_weight: The pitfall's weight, negative; 0 without a pitfall.
    """

    kinds: tuple[str, ...]
    weights: tuple[int, ...]
    pitfall: Literal["none", "myth", "kind"]
    pitfall_kind: str
    pitfall_weight: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What a response states, independent of its rubric.

    Args:
        claims: The statements about the animal in question, true or false, without repetitions.
        n_true: Number of true claims.
        n_false: Number of false claims.
        n_foreign: Number of sentences that state a fact about another animal.
        n_repeated: Number of sentences that repeat a claim.
        n_unreadable: Number of sentences that state no fact of this world.
    """

    claims: tuple[Fact, ...]
    n_true: int
    n_false: int
    n_foreign: int
    n_repeated: int
    n_unreadable: int


def _predicate(kind: str, value: str) -> str:
    """A regex for a kind's predicate; `value` is a regex for its value."""
    return re.escape(_KIND[kind].says.replace("{}", "@")).replace("@", value)


_SENTENCES = {kind: re.compile(rf"the (\w+) {_predicate(kind, '([a-z]+)')}", re.IGNORECASE) for kind in KIND_NAMES}
_VALUES = {kind.name: {value.casefold(): value for value in kind.values} for kind in KINDS}


def read_fact(sentence: str) -> Fact | None:
    """The fact that a sentence (without its full stop) states; None if it states no fact of this world."""
    for kind, pattern in _SENTENCES.items():
        match = pattern.fullmatch(" ".join(sentence.split()))
        if match and match[1].casefold() in TOPICS and match[2].casefold() in _VALUES[kind]:
            return Fact(match[1].casefold(), kind, _VALUES[kind][match[2].casefold()])
    return None


_START = r"(?:^|\.)\s*"  # A sentence starts at the start of a line or after a full stop.


def _says(topic: str, kind: str, value: str) -> str:
    """A regex for the whole sentence; `value` is a regex for its value."""
    return rf"{_START}the\s+{topic}\s+{_predicate(kind, value)}\s*\.".replace(r"\ ", r"\s+")


def states(fact: Fact, weight: float = 1.0) -> Criterion:
    """The criterion that a fact is stated and not contradicted; with a negative weight, the pitfall of stating it."""
    stated = {"regex": _says(fact.topic, fact.kind, re.escape(fact.value))}
    other = {"regex": _says(fact.topic, fact.kind, rf"(?!{re.escape(fact.value)}\b)\w+")}
    return Criterion(
        text=f"States that {_lower(fact.sentence)}",
        weight=float(weight),  # Weights read from a file are floats.
        title=fact.kind,
        tags=(f"kind:{fact.kind}",) if weight > 0 else (f"kind:{fact.kind}", "pitfall:myth"),
        check={"every": [stated, {"not": other}]} if weight > 0 else stated,
    )


def tells(topic: str, kind: str, weight: float) -> Criterion:
    """The criterion that any fact of a kind is stated, true or not. Its weight is negative: it is a pitfall."""
    return Criterion(
        text=f"Tells the {kind} of the {topic}.",
        weight=float(weight),  # Weights read from a file are floats.
        title=kind,
        tags=(f"kind:{kind}", "pitfall:kind"),
        check={"regex": _says(topic, kind, r"\w+")},
    )


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


# --- The world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The facts, prompts and rubrics, all of them functions of these three numbers.

    Args:
        seed: Seed of the facts, myths and habits. The shipped nano model knows the facts of seed 0 only.
        task_seed: Seed of the rubrics and of the splits. The nano model knows nothing about them, so every task seed is
            a new task for it.
        generality: Share of the prompts whose rubric follows the modifier, in [0, 1].

    Raises:
        ConfigError: If `generality` is not in [0, 1].
    """

    seed: int = 0
    task_seed: int = 0
    generality: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.generality, bool) or not 0.0 <= self.generality <= 1.0:
            raise ConfigError(
                f"generality must be in [0, 1], got {self.generality!r}: with 1 all rubrics follow the modifier, with "
                "0 none does"
            )

    # Facts and habits depend only on `seed`.

    def fact(self, topic: str, kind: str) -> Fact:
        """The true fact."""
        self._check(topic=topic, kind=kind)
        return self._lore[topic, kind][0]

    def myth(self, topic: str, kind: str) -> Fact:
        """The myth: the same statement with a wrong value."""
        self._check(topic=topic, kind=kind)
        return self._lore[topic, kind][1]

    def is_believed(self, topic: str, kind: str) -> bool:
        """Whether the myth is widely believed, that is, stated more often than the truth."""
        return _share("believed", self.seed, topic, kind) < BELIEVED_SHARE

    def facts(self, topic: str) -> tuple[Fact, ...]:
        """All twelve facts about an animal."""
        return tuple(self.fact(topic, kind) for kind in KIND_NAMES)

    @cached_property
    def _lore(self) -> dict[tuple[str, str], tuple[Fact, Fact]]:
        """(Topic, kind) -> the fact and the myth."""
        lore = {}
        for topic, kind in itertools.product(TOPICS, KIND_NAMES):
            truth, myth, *_ = _shuffled(_KIND[kind].values, "values", self.seed, topic, kind)
            lore[topic, kind] = Fact(topic, kind, truth), Fact(topic, kind, myth)
        return lore

    def habits(self, modifier: str) -> tuple[str, ...]:
        """The kinds of facts that this reader is usually told, independent of any rubric."""
        self._check(modifier=modifier)
        return tuple(_shuffled(KIND_NAMES, "habits", self.seed, modifier)[:N_HABITS])

    def digest(self) -> str:
        """A short digest of vocabulary, facts, myths and habits, which a nano model's pretraining depends on."""
        facts = [
            [f.sentence, self.myth(t, f.kind).value, self.is_believed(t, f.kind)] for t in TOPICS for f in self.facts(t)
        ]
        words = [TOPICS, MODIFIERS, QUESTIONS, THINK, [[k.name, k.says, k.values] for k in KINDS]]
        habits = [self.habits(modifier) for modifier in MODIFIERS]
        return hashlib.sha256(json.dumps([words, facts, habits]).encode()).hexdigest()[:16]

    # Rubrics depend on `task_seed` and `generality`.

    def follows_modifier(self, topic: str, modifier: str) -> bool:
        """Whether this prompt's rubric follows its modifier, instead of being drawn for this prompt."""
        return _share("general", self.task_seed, topic, modifier) < self.generality

    def ask(self, topic: str, modifier: str) -> Ask:
        """What the reader of this prompt wants to know."""
        self._check(topic=topic, modifier=modifier)
        if self.follows_modifier(topic, modifier):
            return self._asks[modifier]
        key = ("own", self.task_seed, topic, modifier)
        n_asked = _pick(N_ASKED, "n", *key)
        pitfall = _pick(("none", "none", "myth", "kind"), "pitfall", *key)
        return _ask(_shuffled(KIND_NAMES, *key), n_asked, pitfall, key)

    @cached_property
    def _asks(self) -> dict[str, Ask]:
        """What each modifier's readers want to know.

        All kinds are asked for equally often. Otherwise a policy could gain by stating a popular kind to every reader.
        """
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
        """The rubric of a prompt: its facts in order, then its pitfall."""
        ask = self.ask(topic, modifier)
        criteria = [states(self.fact(topic, k), w) for k, w in zip(ask.kinds, ask.weights, strict=True)]
        if ask.pitfall == "myth":
            criteria.append(states(self.myth(topic, ask.pitfall_kind), ask.pitfall_weight))
        elif ask.pitfall == "kind":
            criteria.append(tells(topic, ask.pitfall_kind, ask.pitfall_weight))
        return Rubric(tuple(criteria))

    def ideal_response(self, topic: str, modifier: str) -> str:
        """The facts asked for, in order, and nothing else. Its satisfaction is 1."""
        return " ".join(self.fact(topic, kind).sentence for kind in self.ask(topic, modifier).kinds)

    def question(self, topic: str, modifier: str) -> str:
        """The user's message."""
        self._check(topic=topic, modifier=modifier)
        return _pick(QUESTIONS, "question", self.task_seed, topic, modifier).format(topic=topic, modifier=modifier)

    # Splits and examples.

    def split_of(self, topic: str, modifier: str) -> Split:
        """The split of a prompt."""
        self._check(topic=topic, modifier=modifier)
        # A Latin square: every split has each topic, and each modifier, equally often.
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
        """Prompts with their rubrics, in a seeded order that mixes topics and modifiers.

        Args:
            splits: The splits to include; all of them by default.
            think: Whether the system message tells the model to think first.

        Raises:
            ConfigError: If a split is unknown.
        """
        if unknown := set(splits) - set(SPLITS):
            raise ConfigError(f"unknown splits {sorted(unknown)}, known: {', '.join(SPLITS)}")
        pairs = _shuffled(itertools.product(TOPICS, MODIFIERS), "examples", self.task_seed)
        return [self.example(t, m, think=think) for t, m in pairs if not splits or self.split_of(t, m) in splits]

    def example(self, topic: str, modifier: str, *, think: bool = False) -> Example:
        """One prompt with its rubric. Tags give split, topic, modifier, and whether the rubric follows the modifier."""
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
        """Read what a response, without its reasoning, states about an animal."""
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
                    f"unknown {what} {value!r}, known: {', '.join(known[:6])}, ...; see rgsd.lab.vocabulary"
                )


def _ask(order: Sequence[str], n_asked: int, pitfall: Literal["none", "myth", "kind"], key: Sequence[Any]) -> Ask:
    """Ask for the first `n_asked` kinds of the order. The next one is the pitfall, if the pitfall is about a kind."""
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
    """Convert an example to a row of the schema `rgsd` (`rgsd.data.schemas.jsonl`), without losing anything."""
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
    """Write examples to a file for `rgsd train --data`. Split it with `--held_out_tags split:held-out`."""
    target = Path(path)
    target.write_text("".join(json.dumps(row(e), ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    return target
