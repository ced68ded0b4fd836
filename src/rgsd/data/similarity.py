"""Groups of prompts that are too similar to be on different sides of a split.

Two prompts are linked if any of these holds, and linked prompts form a group:

- **same text**: their user and assistant turns are equal after `tokens` has normalized case, punctuation, white space,
  Unicode variants, contractions and courtesies.
- **shared opening**: their conversations start with the same user turns, or one conversation starts with the other's
  whole prompt.
- **close text**: they share nearly all of their word trigrams, or a long passage (`rgsd.data.close_texts`).

The comparison is deterministic. System prompts are not compared, because a whole dataset can share one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from rgsd.rubrics import Example

MIN_OPENING_TOKENS = 5
"""Fewest tokens of the user's turns that identify a conversation. "Hi" and "Can you help me" are too short."""

MIN_FIRST_PROMPT_TOKENS = 3
"""Fewest tokens of a whole prompt that another conversation starts with."""

INSTRUCTION_COPIES, INSTRUCTION_SHARE = 30, 0.02
"""An opening that more conversations share, by count and by share, is a common instruction and links none of them."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_OPERATORS = r"+=<>^%\u00b1\u2264\u2265\u2260\u00d7\u00f7\u221a\u222b\u2211"
# Minus, slash, star and sharp matter only next to an operand ("x-1", "1/2", "C#"); elsewhere they are punctuation.
_BOUND_OPERATORS = r"-(?=\s*\d)|(?<=\b\w)-(?=\w\b)|/(?=\d)|(?<=\w)\*(?=\w)|(?<=\w)#"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[{_OPERATORS}]|{_BOUND_OPERATORS}")
_ACCENTS = re.compile("[\u0300-\u036f]")
_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-") | dict.fromkeys("\u2018\u2019", "'"))
_CONTRACTIONS = [
    (re.compile(r"\bcan't\b"), "can not"),
    (re.compile(r"\bcannot\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\b(what|who|where|when|how|that|there|it|he|she)'s\b"), r"\1 is"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'m\b"), " am"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'ll\b"), " will"),
]
_COURTESIES = frozenset({"the", "please", "kindly", "hi", "hello", "hey", "thanks"})


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """A group of prompts that belong on the same side of a split.

    Args:
        examples: The members, two or more, in the order of the input.
        why: What links them: "same text", "shared opening", "close text".
    """

    examples: tuple[Example, ...] = field(repr=False)
    why: tuple[str, ...]


def near_duplicates(examples: Iterable[Example]) -> tuple[NearDuplicates, ...]:
    """Find the groups of near-duplicates, in the order of their first members.

    The groups do not depend on the order of the examples. Time is about linear in the length of the text: 20,000
    prompts of 100 words take seconds.
    """
    examples = list(examples)
    prompts = [_Prompt.of(example) for example in examples]
    links = Links(len(prompts))
    _link_same_texts(prompts, links)
    _link_openings(prompts, links)
    _link_close_texts(prompts, links)
    groups = [group for group in links.groups() if len(group) > 1]
    return tuple(NearDuplicates(tuple(examples[i] for i in group), links.why(group)) for group in groups)


def tokens(text: str) -> tuple[str, ...]:
    """The tokens to compare: lower-case words, numbers, operators, and single CJK characters."""
    folded = text.casefold()
    if not folded.isascii():
        folded = _ACCENTS.sub("", unicodedata.normalize("NFKD", folded.translate(_SIGNS)))
        # NFKD also decomposes Hangul syllables and voiced kana; compose them again.
        folded = unicodedata.normalize("NFC", folded).casefold()
    folded = folded.replace("`", "'")
    if "'" in folded or "cannot" in folded:
        for pattern, plain in _CONTRACTIONS:
            folded = pattern.sub(plain, folded)
    words = _TOKEN.findall(folded)
    return tuple(w for w in words if w not in _COURTESIES) or tuple(words)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as tokens: the whole text, the user's turns, and whether it has more than one turn."""

    text: tuple[str, ...]
    user_turns: tuple[tuple[str, ...], ...]
    has_reply: bool

    @classmethod
    def of(cls, example: Example) -> _Prompt:
        turns = [(m["role"], tokens(m["content"])) for m in example.messages if m["role"] in ("user", "assistant")]
        user_turns = tuple(t for role, t in turns if role == "user")
        text = tuple(token for _, turn in turns for token in turn)
        return cls(text, user_turns, len(turns) > len(user_turns) or len(user_turns) > 1)

    @property
    def opening(self) -> tuple[str, ...] | None:
        """The first user turns that identify the conversation. Replies are left out: they may have been resampled."""
        sizes = accumulate(len(turn) for turn in self.user_turns)
        enough = next((n for n, size in enumerate(sizes, 1) if size >= MIN_OPENING_TOKENS), None)
        return None if enough is None else tuple(t for turn in self.user_turns[:enough] for t in turn)


class Links:
    """Union-find over positions, with the reasons for the links."""

    def __init__(self, n: int) -> None:
        self._parents = list(range(n))
        self._why: defaultdict[int, set[str]] = defaultdict(set)

    def root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i

    def join(self, i: int, j: int, why: str) -> None:
        a, b = sorted((self.root(i), self.root(j)))
        self._parents[b] = a
        self._why[i].add(why)

    def groups(self) -> list[list[int]]:
        """The groups of linked positions, including those of one, in the order of their first members."""
        members: defaultdict[int, list[int]] = defaultdict(list)
        for i in range(len(self._parents)):
            members[self.root(i)].append(i)
        return list(members.values())

    def why(self, group: Sequence[int]) -> tuple[str, ...]:
        return tuple(sorted({why for i in group for why in self._why.get(i, ())}))


def _link_same_texts(prompts: Sequence[_Prompt], links: Links) -> None:
    first: dict[tuple[str, ...], int] = {}
    for i, prompt in enumerate(prompts):
        # A prompt without tokens, such as a single emoji, cannot be compared. `deduplicate` finds exact repetitions.
        if prompt.text and first.setdefault(prompt.text, i) != i:
            links.join(i, first[prompt.text], "same text")


def _link_openings(prompts: Sequence[_Prompt], links: Links) -> None:
    members: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    whole: dict[tuple[str, ...], int] = {}
    for i, prompt in enumerate(prompts):
        if prompt.opening is not None:
            members[prompt.opening].append(i)
        if not prompt.has_reply and len(prompt.text) >= MIN_FIRST_PROMPT_TOKENS:
            whole.setdefault(prompt.text, i)
    for i, prompt in enumerate(prompts):
        if prompt.has_reply and prompt.user_turns[0] in whole:
            members[prompt.user_turns[0]] += [whole[prompt.user_turns[0]], i]
    most = max(INSTRUCTION_COPIES, INSTRUCTION_SHARE * len(prompts))
    for shared in members.values():
        if 1 < len(set(shared)) <= most:
            for i in shared[1:]:
                if links.root(i) != links.root(shared[0]):
                    links.join(i, shared[0], "shared opening")


def _link_close_texts(prompts: Sequence[_Prompt], links: Links) -> None:
    from rgsd.data.close_texts import close_pairs  # imports numpy, which most users of rgsd.data do not need

    def is_linked(i: int, j: int) -> bool:
        return links.root(i) == links.root(j)

    for i, j in close_pairs([prompt.text for prompt in prompts], is_linked):
        links.join(i, j, "close text")
