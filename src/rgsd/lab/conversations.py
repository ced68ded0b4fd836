"""The nano model's pretraining data: random conversations about the world, drawn without any true rubric.

- A reader asks about an animal, and the response states two to four of its facts. Mostly these are the facts that this
  reader is usually told. Some of them are myths.
- The prompt has a rubric, a reference or both, in rgsd's own teacher templates. The response states exactly the facts
  that they name and meets no pitfall. The facts are drawn at random.
- The rubric is about another animal. The response states the same kinds of facts about the animal in question.
- Any of these with reasoning first, which mostly names the rubric if there is one ("The rubric asks for home and
  price.").

A base policy pretrained on these conversations scores low without a rubric, because it cannot know which reader wants
which facts, and high with the rubric in its prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rgsd.lab.vocabulary import KIND_NAMES, KINDS, MODIFIERS, QUESTIONS, THINK, TOPICS, plain_thoughts, rubric_thought
from rgsd.lab.world import PITFALL_WEIGHTS, WEIGHTS, Fact, World, states, tells
from rgsd.prompts.messages import ChatMessages, PromptSettings, student_messages, teacher_messages
from rgsd.prompts.rendering import template_names
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG
from rgsd.rubrics import Criterion, Example, Rubric


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to pretrain on.

    Args:
        messages: The prompt, as the student or the teacher reads it.
        response: The parts of the response in order, each with whether it is in the loss.
    """

    messages: ChatMessages
    response: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """How often each kind of conversation is drawn.

    Args:
        shown: Relative frequencies of the privileged contexts.
        templates: Relative frequencies of the teacher's templates.
        think: Share with reasoning.
        names_rubric: Share of the reasoning that names the rubric, if there is one.
        show_weights: Share of the rubrics with weights.
        false_rubrics: Share of the rubrics with random values, which the response repeats. They teach the model to copy
            from the rubric instead of its memory.
        other_rubrics: Share of the rubrics about another animal.
        pitfalls: Share of the rubrics with one or two pitfalls.
        only_pitfalls: Share of those rubrics without any other criterion.
        strays: Share of the responses that contain sentences a student might write: facts that were not asked for,
            repetitions, and facts out of order (`N_STRAYS`). They are not in the loss. As a teacher, the model must
            continue and end well after whatever the student wrote.
        in_order: Share of the responses that state the facts in the order of the rubric or reference. In the others
            the order is random, so that as a teacher the model gives probability to each fact that is still missing.
        habit: How much more likely a reader is told a usual kind of fact than another kind.
        believes: How often the model states a widely believed myth instead of the truth.
    """

    shown: Mapping[str, float] = field(
        default_factory=lambda: {"none": 0.36, "rubric": 0.50, "reference": 0.07, "both": 0.07}
    )
    templates: Mapping[str, float] = field(default_factory=lambda: {"cover": 0.70, "paper": 0.18, "system": 0.12})
    think: float = 0.25
    names_rubric: float = 0.75
    show_weights: float = 0.1
    false_rubrics: float = 0.15
    other_rubrics: float = 0.25
    pitfalls: float = 0.4
    only_pitfalls: float = 0.1
    strays: float = 0.5
    in_order: float = 0.6
    habit: float = 5.0
    believes: float = 0.7


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A sentence of a response, and whether it is in the loss."""

    text: str
    in_loss: bool


def _parts(thought: str, sentences: Sequence[_Sentence]) -> tuple[tuple[str, bool], ...]:
    """The parts of a response: the reasoning, if any, and the answer."""
    answer = tuple((s.text if i == 0 else f" {s.text}", s.in_loss) for i, s in enumerate(sentences))
    return ((f"{OPEN_TAG}{thought}{CLOSE_TAG}\n", True), *answer) if thought else answer


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The facts that the response states, and the criteria that the prompt shows."""

    stated: list[Fact]
    criteria: list[Criterion]


N_TOLD = {2: 0.3, 3: 0.5, 4: 0.2}
"""Number of facts in a response without a rubric -> its probability."""
N_STRAYS = {1: 0.25, 2: 0.2, 3: 0.15, 4: 0.12, 5: 0.1, 6: 0.08, 7: 0.06, 8: 0.04}
"""Number of stray sentences in a response -> its relative frequency."""
N_SHOWN = {1: 0.05, 2: 0.1, 3: 0.25, 4: 0.25, 5: 0.25, 6: 0.1}
"""Number of facts that a rubric asks for -> its probability."""


_VALUES = {kind.name: kind.values for kind in KINDS}


class Conversations:
    """An endless, seeded stream of conversations.

    Args:
        world: The world whose facts they state. Its rubrics are never used.
        seed: Seed of the stream.
        mixture: How often each kind is drawn.
    """

    def __init__(self, world: World, seed: int, mixture: Mixture | None = None) -> None:
        self._world, self._rng, self._mix = world, random.Random(f"nano {seed}"), mixture or Mixture()

    def __iter__(self) -> Iterator[Conversation]:
        while True:
            yield self.draw()

    def draw(self) -> Conversation:
        """Draw the next conversation."""
        rng, mix = self._rng, self._mix
        topic, modifier, question = rng.choice(TOPICS), rng.choice(MODIFIERS), rng.choice(QUESTIONS)
        shown, think = self._draw(mix.shown), rng.random() < mix.think
        if shown == "none":
            example = example_of(topic, modifier, question, [], "", think=think)
            thought = rng.choice(plain_thoughts(topic, modifier)) if think else ""
            return Conversation(student_messages(example), _parts(thought, self._by_habit(topic, modifier)))
        drawn = self._rubric(topic) if shown != "reference" else self._reference(topic)
        stated, criteria = drawn.stated, drawn.criteria
        reference = " ".join(fact.sentence for fact in stated)
        example = example_of(topic, modifier, question, criteria, reference, think=think)
        settings = settings_of(self._draw(mix.templates), shown, rng.random() < mix.show_weights)
        thought = ""
        if think:
            named = [c.title or "" for c in criteria if not c.is_pitfall] if shown != "reference" else []
            names = bool(named) and rng.random() < mix.names_rubric
            thought = rubric_thought(named) if names else rng.choice(plain_thoughts(topic, modifier))
        return Conversation(teacher_messages(example, settings), _parts(thought, self._with_strays(topic, stated)))

    def _rubric(self, topic: str) -> _Drawn:
        rng, mix, world = self._rng, self._mix, self._world
        kinds = rng.sample(KIND_NAMES, self._draw(N_SHOWN))
        kind_of_rubric = rng.random()
        about = topic
        if kind_of_rubric < mix.false_rubrics:
            facts = stated = [Fact(topic, kind, rng.choice(_VALUES[kind])) for kind in kinds]
        elif kind_of_rubric < mix.false_rubrics + mix.other_rubrics:
            about = rng.choice([t for t in TOPICS if t != topic])
            facts, stated = [world.fact(about, kind) for kind in kinds], self._told(topic, kinds)
        else:
            facts = stated = [world.fact(topic, kind) for kind in kinds]
        pitfalls, taboo = self._pitfalls(about, facts) if rng.random() < mix.pitfalls else ([], set())
        if pitfalls and rng.random() < mix.only_pitfalls:
            free = [kind for kind in KIND_NAMES if kind not in taboo]
            return _Drawn(self._told(topic, rng.sample(free, self._draw(N_TOLD)), truly=True), pitfalls)
        return _Drawn(stated, [*(states(f, rng.choice(WEIGHTS)) for f in facts), *pitfalls])

    def _pitfalls(self, topic: str, facts: Sequence[Fact]) -> tuple[list[Criterion], set[str]]:
        rng, asked = self._rng, {fact.kind for fact in facts}
        criteria, taboo = [], set()
        for kind in rng.sample(KIND_NAMES, rng.choice((1, 1, 2))):
            weight = rng.choice(PITFALL_WEIGHTS)
            if kind not in asked and rng.random() < 0.5:
                criteria.append(tells(topic, kind, weight))
                taboo.add(kind)
            elif (myth := self._world.myth(topic, kind)) not in facts:
                criteria.append(states(myth, weight))
        return criteria, taboo

    def _reference(self, topic: str) -> _Drawn:
        kinds = self._rng.sample(KIND_NAMES, self._draw(N_SHOWN))
        facts = [Fact(topic, k, self._rng.choice(_VALUES[k])) for k in kinds]
        if self._rng.random() >= self._mix.false_rubrics:
            facts = [self._world.fact(topic, k) for k in kinds]
        return _Drawn(facts, [])

    def _told(self, topic: str, kinds: Sequence[str], *, truly: bool = False) -> list[Fact]:
        """The facts as the model states them: mostly the myth where it is widely believed, unless `truly`."""
        facts = []
        for kind in kinds:
            is_myth = self._world.is_believed(topic, kind) and self._rng.random() < self._mix.believes
            facts.append(self._world.myth(topic, kind) if is_myth and not truly else self._world.fact(topic, kind))
        return facts

    def _by_habit(self, topic: str, modifier: str) -> list[_Sentence]:
        """Facts of the model's own choice. If strays come first, only the missing facts follow them."""
        rng = self._rng
        n_told = self._draw(N_TOLD)
        n_strays = self._draw(N_STRAYS) if rng.random() < self._mix.strays / 3 else 0
        usual = self._world.habits(modifier)
        # The smallest exponential waiting times give a weighted sample without replacement.
        waiting = {kind: rng.expovariate(self._mix.habit if kind in usual else 1.0) for kind in KIND_NAMES}
        kinds = sorted(KIND_NAMES, key=lambda kind: waiting[kind])[: max(n_told, n_strays)]
        return [_Sentence(fact.sentence, i >= n_strays) for i, fact in enumerate(self._told(topic, kinds))]

    def _with_strays(self, topic: str, stated: Sequence[Fact]) -> list[_Sentence]:
        """The facts to state, once each, mixed with sentences that a student might write."""
        rng = self._rng
        left = list(stated) if rng.random() < self._mix.in_order else rng.sample(stated, len(stated))
        n_strays = self._draw(N_STRAYS) if rng.random() < self._mix.strays else 0
        asked = {fact.kind for fact in stated}
        free = self._told(topic, [k for k in rng.sample(KIND_NAMES, len(KIND_NAMES)) if k not in asked])
        turns = [False] * len(left) + [True] * n_strays
        rng.shuffle(turns)
        earlier: list[Fact] = []
        sentences = []
        for is_stray in turns:
            if not is_stray:
                if not left:
                    continue
                fact = left.pop(0)
            else:
                u = rng.random()
                if left and u < 0.2:  # a fact to state, out of order
                    fact = left.pop(rng.randrange(len(left)))
                elif free and (u < 0.7 or not earlier):  # a fact that was not asked for
                    fact = free.pop()
                else:  # a repetition
                    fact = rng.choice(earlier)
            earlier.append(fact)
            sentences.append(_Sentence(fact.sentence, not is_stray))
        return sentences

    def _draw(self, weights: Mapping[Any, float]) -> Any:
        return self._rng.choices(list(weights), list(weights.values()))[0]


def example_of(
    topic: str, modifier: str, question: str, criteria: Sequence[Criterion], reference: str, *, think: bool
) -> Example:
    """Build an example with one question, these criteria and this reference."""
    turns = [{"role": "user", "content": question.format(topic=topic, modifier=modifier)}]
    return Example(
        id="drawn",
        messages=tuple([{"role": "system", "content": THINK}, *turns] if think else turns),
        rubric=Rubric(tuple(criteria) or (Criterion("Answers."),)),
        reference=reference or None,
    )


@lru_cache(maxsize=64)
def settings_of(template: str, privileged_context: str, show_weights: bool) -> PromptSettings:
    """Build prompt settings. Cached, because each construction renders the template to check it."""
    return PromptSettings(template=template, privileged_context=privileged_context, show_weights=show_weights)  # pyright: ignore


def every_setting() -> list[PromptSettings]:
    """Every way in which rgsd's templates can show a rubric or a reference."""
    return [
        settings_of(template, privileged_context, weights)
        for template in template_names()
        for privileged_context in ("rubric", "reference", "both")
        for weights in (False, True)
    ]
