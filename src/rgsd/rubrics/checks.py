r"""Programmatic checks, which decide a criterion exactly and at no cost.

A check is a small JSON object that is stored with its criterion. Its one key is the kind:

    {"any": ["call an ambulance", "911"]}        contains at least one of the phrases
    {"all": ["sleep", "exercis*"]}               contains every phrase
    {"order": ["rinse", "cover"]}                contains the phrases, in this order
    {"regex": "\\b\\d+ (mg|ml)\\b"}              matches the regular expression (case ignored)
    {"count": {"of": "words", "max": 120}}       counts words, sentences, paragraphs, bullets, numbered, or the matches
                                                 of {"of": {"regex": ...}}; "min" and "max" are inclusive
    {"not": CHECK}                               the check does not hold
    {"every": [CHECK, ...]}                      all of them hold
    {"some": [CHECK, ...]}                       at least one holds
    {"starts": CHECK}, {"ends": CHECK}           the check holds on the first / last sentence that has a word in it
    {"negated": ["antibiotics"]}                 some phrase stands in a sentence with a negation before it
    {"affirmed": ["antibiotics"]}                some phrase stands in a sentence with no negation before it

Phrases ignore case and the amount of white space, match whole words, and may end in `*` to match any ending
("dehydrat*"). Curly quotes and dashes count as their plain forms.

Patterns and responses come from outside, so both are limited. A check that takes longer than `CHECK_SECONDS`, or a text
of more than `MAX_TEXT_CHARS`, is undecided: the criterion is unscored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import regex

from rgsd.errors import CheckUndecided, DataError

CHECKS_VERSION = 1
"""Raise it when a check may decide the same text differently. Verdicts stored under another version are not reused."""
PLAIN = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u00a0": " "}
)
"""Maps typographic quotes, dashes and spaces to their plain forms."""
_BULLET = re.compile(r"^[ \t]*[-*•+][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+|\n+")
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|neither|nor|without|cannot|avoid\w*|rather than|instead of|unlikely|\w+n't)\b",
    re.IGNORECASE,
)
CHECK_SECONDS = 1.0
"""The time limit of one check on one text. Ordinary checks take well under a millisecond."""
MAX_TEXT_CHARS = 1_000_000
"""The longest text that is checked."""
MAX_PATTERN_CHARS = 10_000
"""The longest regular expression or phrase."""
MAX_EFFORT = 300_000_000
"""The largest product of the lengths of a phrase and a text: about a second of searching at worst."""
MAX_REPEATED = 100_000
"""The most items that a regular expression may require, after expanding its repeat counts, as compiling it does."""
MAX_PARTS, MAX_DEPTH = 1_000, 20
"""The most checks and phrases within one check, and the deepest nesting."""
_MIN_SECONDS = 0.01
_LITERAL_BRACE = re.compile(r"(\\.)|\{(?!\d+(?:,\d*)?\}|,\d*\})", re.DOTALL)
"""An escaped character, or a brace that opens no repeat count. `re` takes such a brace literally, but `regex` may read
`{e<=1}` as fuzzy matching."""
_UNITS = ("words", "sentences", "paragraphs", "bullets", "numbered")
_KINDS = ["any", "all", "order", "regex", "count", "not", "every", "some", "starts", "ends", "negated", "affirmed"]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that contain at least one word."""
    return [s.strip() for s in _SENTENCE_END.split(text) if re.search(r"\w", s)]


@lru_cache(maxsize=4096)
def _phrase(phrase: str) -> re.Pattern[str]:
    body = r"\s+".join(re.escape(word) for word in phrase.rstrip("*").translate(PLAIN).split())
    # \b next to a non-word character would demand a word on its other side.
    left = r"\b" if re.match(r"\w", body) else ""
    right = r"\w*" if phrase.endswith("*") else (r"\b" if re.search(r"\w$", body) else "")
    return re.compile(left + body + right, re.IGNORECASE)


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> regex.Pattern[str]:
    # `re` cannot be interrupted, but `regex` has a timeout. In its version 0 both agree, except for braces.
    plain = _LITERAL_BRACE.sub(lambda match: match[1] or r"\{", pattern)
    try:
        return regex.compile(plain, regex.IGNORECASE | regex.MULTILINE | regex.VERSION0)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise CheckUndecided(f"check 'regex' {_clipped(pattern)} cannot be compiled ({error}): simplify it") from None


_TIMEOUTS: dict[str, int] = {}
"""The number of timeouts of each pattern in this process."""


@contextmanager
def _time_left(pattern: str, deadline: float) -> Iterator[float]:
    """The seconds that a pattern may take on the next text.

    Each timeout leaves the pattern a quarter of that for later texts. Texts that it matches at an ordinary pace still
    get their verdict, and a run full of bad texts loses about a second in total, rather than one per response.
    """
    seconds = max(_MIN_SECONDS, CHECK_SECONDS / 4 ** min(_TIMEOUTS.get(pattern, 0), 8))
    try:
        yield max(_MIN_SECONDS, min(seconds, deadline - time.monotonic()))
    except TimeoutError:
        _TIMEOUTS[pattern] = _TIMEOUTS.get(pattern, 0) + 1
        raise CheckUndecided(
            f"check 'regex' {_clipped(pattern)} did not finish in {seconds:.2g} s on this response: it backtracks too "
            "much, so rewrite nested repeats such as (a+)+ as a+"
        ) from None


def _clipped(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + " ...")


def validate(check: Any) -> None:
    """Refuse a malformed check.

    Raises:
        DataError: If a part of the check is malformed, naming the part and the expected form.
    """
    _validate_size(check)
    _validate(check)


def _validate_size(check: Any) -> None:
    """Refuse a check that is too large or too deep, before anything walks it recursively."""
    # Breadth first, without recursion, which a deep check could exhaust.
    n_parts, level, depth = 0, [check], 0
    while level:
        n_parts, depth = n_parts + len(level), depth + 1
        if n_parts > MAX_PARTS or depth > 2 * MAX_DEPTH:  # each level is a list and an object
            raise DataError(
                f"a check may have at most {MAX_PARTS:,} checks and phrases and {MAX_DEPTH} levels, got more: split it "
                "into several criteria"
            )
        bodies = [v for part in level if isinstance(part, Mapping) for v in part.values()]
        level = bodies + [v for part in level if isinstance(part, list) for v in part]


def _validate(check: Any) -> None:
    if not isinstance(check, Mapping) or len(check) != 1:
        raise DataError(f"a check must be an object with one key out of {', '.join(_KINDS)}, got {check!r}")
    ((kind, body),) = check.items()
    if kind in ("any", "all", "order", "negated", "affirmed"):
        if not isinstance(body, list) or not body or not all(isinstance(p, str) and p.strip(" *") for p in body):
            raise DataError(f"check {kind!r} must be a non-empty list of phrases, got {body!r}")
        if longest := next((p for p in body if len(p) > MAX_PATTERN_CHARS), None):
            raise DataError(
                f"check {kind!r} has a phrase of {len(longest):,} characters, at most {MAX_PATTERN_CHARS:,} are allowed"
            )
    elif kind == "regex":
        _validate_regex(body)
    elif kind == "count":
        _validate_count(body)
    elif kind in ("not", "starts", "ends"):
        _validate(body)
    elif kind in ("every", "some"):
        if not isinstance(body, list) or not body:
            raise DataError(f"check {kind!r} must be a non-empty list of checks, got {body!r}")
        for part in body:
            _validate(part)
    else:
        raise DataError(f"unknown check {kind!r}, known: {', '.join(_KINDS)}")


def _validate_regex(pattern: Any) -> None:
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
        raise DataError(
            f"check 'regex' has {len(pattern):,} characters, the limit is {MAX_PATTERN_CHARS:,}: shorten it"
        )
    try:
        n_repeated = _n_repeated(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"check 'regex' must be a regular expression, got {pattern!r}: {error}") from None
    if n_repeated > MAX_REPEATED:
        raise DataError(
            f"check 'regex' {_clipped(pattern)} requires {n_repeated:,} items after expanding its repeat counts, the "
            f"limit is {MAX_REPEATED:,}: lower the counts"
        )


@lru_cache(maxsize=4096)
def _n_repeated(pattern: str) -> int:
    """The least number of items that a pattern requires. Raises what `re` raises for an invalid pattern."""
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    return _n_items(re._parser.parse(pattern, re.IGNORECASE | re.MULTILINE))  # pyright: ignore[reportAttributeAccessIssue]


def _n_items(part: Any) -> int:
    """The size of a part of a parsed pattern, where a repeat is the tuple (least, most, part)."""
    if isinstance(part, tuple) and len(part) == 3 and isinstance(part[0], int) and isinstance(part[1], int):
        return max(1, part[0]) * _n_items(part[2])
    # `re` parses a pattern into sequences of its own class, which has getwidth.
    return sum(_n_items(p) for p in part) if isinstance(part, tuple | list) or hasattr(part, "getwidth") else 1


def _validate_count(body: Any) -> None:
    if not isinstance(body, Mapping) or "of" not in body:
        raise DataError(f"check 'count' must be {{'of': ..., 'min': n and/or 'max': n}}, got {body!r}")
    if unknown := set(body) - {"of", "min", "max"}:
        raise DataError(f"check 'count' has unknown keys {sorted(unknown)}, known: of, min, max")
    if not {"min", "max"} & set(body):
        raise DataError(f"check 'count' needs a 'min' or a 'max', got {body!r}")
    for bound in ("min", "max"):
        if bound in body and (isinstance(body[bound], bool) or not isinstance(body[bound], int) or body[bound] < 0):
            raise DataError(f"check 'count': {bound!r} must be a whole number of at least 0, got {body[bound]!r}")
    of = body["of"]
    if isinstance(of, Mapping) and set(of) == {"regex"}:
        _validate_regex(of["regex"])
    elif of not in _UNITS:
        raise DataError(f"check 'count' can count {', '.join(_UNITS)} or {{'regex': ...}}, got {of!r}")


def _count(of: Any, text: str, deadline: float) -> int:
    if isinstance(of, Mapping):
        with _time_left(of["regex"], deadline) as seconds:
            return sum(1 for _ in _pattern(of["regex"]).finditer(text, timeout=seconds))
    if of == "words":
        return len(re.findall(r"\w+(?:['.,-]\w+)*", text))
    if of == "sentences":
        return len(sentences(text))
    if of == "paragraphs":
        return len([p for p in re.split(r"\n\s*\n", text) if p.strip()])
    return len((_BULLET if of == "bullets" else _NUMBERED).findall(text))


def _in_order(phrases: list[str], text: str, deadline: float) -> bool:
    position = 0
    for phrase in phrases:
        _check_effort(phrase, text, deadline)
        match = _phrase(phrase).search(text, position)
        if match is None:
            return False
        position = match.end()
    return True


def _mentions(phrases: list[str], text: str, deadline: float, *, negated: bool) -> bool:
    for sentence in sentences(text):
        _check_time(deadline)
        negation = _NEGATION.search(sentence)
        # A phrase counts as negated after the first negation of its sentence. One search per sentence is linear.
        begin = len(sentence) + 1 if negation is None else negation.end()
        for phrase in phrases:
            _check_effort(phrase, sentence, deadline)
            for match in _phrase(phrase).finditer(sentence):
                if (match.start() >= begin) == negated:
                    return True
                if not negated:
                    break  # the first one comes after the negation, so all do
    return False


def _check_effort(phrase: str, text: str, deadline: float) -> None:
    """Refuse a search that cannot be stopped and may take long: a phrase may almost match at every word of a text."""
    _check_time(deadline)
    if len(phrase) * len(text) > MAX_EFFORT:
        raise CheckUndecided(
            f"got a phrase of {len(phrase):,} and a text of {len(text):,} characters, together too long to search: "
            "shorten the phrase"
        )


def holds(check: Mapping[str, Any], text: str) -> bool:
    """Whether a valid check holds on a text.

    Raises:
        CheckUndecided: If the text is longer than `MAX_TEXT_CHARS`, or the check takes longer than `CHECK_SECONDS`.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise CheckUndecided(f"the text has {len(text):,} characters, checks read at most {MAX_TEXT_CHARS:,}")
    return _holds(check, text.translate(PLAIN), time.monotonic() + CHECK_SECONDS)


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise CheckUndecided(
            f"the check took longer than {CHECK_SECONDS:g} s on this response: split it into several criteria"
        )


def _holds(check: Mapping[str, Any], text: str, deadline: float) -> bool:
    _check_time(deadline)
    ((kind, body),) = check.items()
    match kind:
        case "any":
            return any(_contains(p, text, deadline) for p in body)
        case "all":
            return all(_contains(p, text, deadline) for p in body)
        case "order":
            return _in_order(body, text, deadline)
        case "regex":
            with _time_left(body, deadline) as seconds:
                return _pattern(body).search(text, timeout=seconds) is not None
        case "count":
            return body.get("min", 0) <= _count(body["of"], text, deadline) <= body.get("max", float("inf"))
        case "not":
            return not _holds(body, text, deadline)
        case "every":
            return all(_holds(part, text, deadline) for part in body)
        case "some":
            return any(_holds(part, text, deadline) for part in body)
        case "starts" | "ends":
            parts = sentences(text)
            return bool(parts) and _holds(body, parts[0 if kind == "starts" else -1], deadline)
        case "negated" | "affirmed":
            return _mentions(body, text, deadline, negated=kind == "negated")
    raise DataError(f"unknown check {kind!r}, known: {', '.join(_KINDS)}")


def _contains(phrase: str, text: str, deadline: float) -> bool:
    _check_time(deadline)
    _check_effort(phrase, text, deadline)
    return _phrase(phrase).search(text) is not None
