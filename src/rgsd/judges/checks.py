r"""Programmatic checks: criteria that a program decides exactly.

A check is a small JSON value that travels with its criterion. One key names the kind:

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

Phrases ignore case and runs of white space, match whole words, and may end in `*` to match any ending ("dehydrat*").
Curly quotes and dashes are read as their plain forms.

Patterns and responses come from outside, so both are limited. A check that would take longer than `CHECK_SECONDS`, or
that meets a text of more than `MAX_TEXT_CHARS`, is undecided: its criterion is unscored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import regex

from rgsd.errors import CheckUndecided, DataError
from rgsd.judges.judgement import Judgement, Task
from rgsd.rubrics import Example, Verdict

CHECKS_VERSION = 1
"""Raise it when a check can decide the same text differently: verdicts stored under another version are not reused."""
PLAIN = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u00a0": " "}
)
"""Typographic quotes, dashes and spaces -> their plain forms."""
_BULLET = re.compile(r"^[ \t]*[-*•+][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+|\n+")
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|neither|nor|without|cannot|avoid\w*|rather than|instead of|unlikely|\w+n't)\b",
    re.IGNORECASE,
)
CHECK_SECONDS = 1.0
"""Time for one check on one text; ordinary checks take well under a millisecond."""
MAX_TEXT_CHARS = 1_000_000
"""Longest text that is checked."""
MAX_PATTERN_CHARS = 10_000
"""Longest regular expression, and longest phrase."""
MAX_REPEATED = 100_000
"""Most items a regular expression may demand, with its repeat counts multiplied out: compiling it takes that memory."""
MAX_PARTS, MAX_DEPTH = 1_000, 20
"""Most checks and phrases within one check, and deepest nesting."""
_LEAST_SECONDS = 0.01
_LITERAL_BRACE = re.compile(r"(\\.)|\{(?!\d+(?:,\d*)?\}|,\d*\})", re.DOTALL)
"""An escaped character, or a brace that opens no repeat count. `re` reads such a brace as itself; `regex` may read
`{e<=1}` as fuzzy matching."""
_UNITS = ("words", "sentences", "paragraphs", "bullets", "numbered")
_KINDS = ["any", "all", "order", "regex", "count", "not", "every", "some", "starts", "ends", "negated", "affirmed"]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that hold at least one word."""
    return [s.strip() for s in _SENTENCE_END.split(text) if re.search(r"\w", s)]


@lru_cache(maxsize=4096)
def _phrase(phrase: str) -> re.Pattern[str]:
    body = r"\s+".join(re.escape(word) for word in phrase.rstrip("*").translate(PLAIN).split())
    left = r"\b" if re.match(r"\w", body) else ""
    right = r"\w*" if phrase.endswith("*") else (r"\b" if re.search(r"\w$", body) else "")
    return re.compile(left + body + right, re.IGNORECASE)


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> regex.Pattern[str]:
    # `re` cannot be stopped; `regex` takes a timeout. In its version 0 the two agree, braces aside.
    plain = _LITERAL_BRACE.sub(lambda found: found[1] or r"\{", pattern)
    try:
        return regex.compile(plain, regex.IGNORECASE | regex.MULTILINE | regex.VERSION0)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise CheckUndecided(f"check 'regex' {_clipped(pattern)} cannot be used: {error}: simplify it") from None


_TIMEOUTS: dict[str, int] = {}
"""How often each pattern has timed out in this process."""


@contextmanager
def _time_left(pattern: str, deadline: float) -> Iterator[float]:
    """Seconds that a pattern may take. Each timeout leaves it a quarter for the next text: texts that it matches at an
    ordinary pace still get their verdict, and a run full of bad ones loses about a second to it, not one a response."""
    seconds = max(_LEAST_SECONDS, CHECK_SECONDS / 4 ** min(_TIMEOUTS.get(pattern, 0), 8))
    try:
        yield max(_LEAST_SECONDS, min(seconds, deadline - time.monotonic()))
    except TimeoutError:
        _TIMEOUTS[pattern] = _TIMEOUTS.get(pattern, 0) + 1
        raise CheckUndecided(
            f"check 'regex' {_clipped(pattern)} got no answer in {seconds:.2g} s on this response: it backtracks "
            "without end; rewrite nested repeats such as (a+)+ as a+"
        ) from None


def _clipped(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + " ...")


def validate(check: Any) -> None:
    """Refuse a malformed check, naming what is wrong with it.

    Raises:
        DataError: with the offending part and the form that is wanted.
    """
    _validate_size(check)
    _validate(check)


def _validate_size(check: Any) -> None:
    """Refuse a check of too many parts or too deep, before anything walks it recursively."""
    n_parts, level, depth = 0, [check], 0
    while level:
        n_parts, depth = n_parts + len(level), depth + 1
        if n_parts > MAX_PARTS or depth > 2 * MAX_DEPTH:  # a list and an object a level
            raise DataError(
                f"a check may hold {MAX_PARTS:,} checks and phrases, {MAX_DEPTH} levels deep; got more: split it into "
                "several criteria"
            )
        bodies = [v for part in level if isinstance(part, Mapping) for v in part.values()]
        level = bodies + [v for part in level if isinstance(part, list) for v in part]


def _validate(check: Any) -> None:
    if not isinstance(check, Mapping) or len(check) != 1:
        raise DataError(f"a check is an object with one key out of {', '.join(_KINDS)}; got {check!r}")
    ((kind, body),) = check.items()
    if kind in ("any", "all", "order", "negated", "affirmed"):
        if not isinstance(body, list) or not body or not all(isinstance(p, str) and p.strip(" *") for p in body):
            raise DataError(f"check {kind!r} wants a non-empty list of phrases, got {body!r}")
        if longest := next((p for p in body if len(p) > MAX_PATTERN_CHARS), None):
            raise DataError(
                f"check {kind!r}: a phrase of {len(longest):,} characters, {MAX_PATTERN_CHARS:,} are allowed"
            )
    elif kind == "regex":
        _validate_regex(body)
    elif kind == "count":
        _validate_count(body)
    elif kind in ("not", "starts", "ends"):
        _validate(body)
    elif kind in ("every", "some"):
        if not isinstance(body, list) or not body:
            raise DataError(f"check {kind!r} wants a non-empty list of checks, got {body!r}")
        for part in body:
            _validate(part)
    else:
        raise DataError(f"unknown check {kind!r}, known: {', '.join(_KINDS)}")


def _validate_regex(pattern: Any) -> None:
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
        raise DataError(f"check 'regex' has {len(pattern):,} characters, {MAX_PATTERN_CHARS:,} are allowed: shorten it")
    try:
        n_repeated = _n_repeated(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"check 'regex' wants a regular expression, got {pattern!r}: {error}") from None
    if n_repeated > MAX_REPEATED:
        raise DataError(
            f"check 'regex' {_clipped(pattern)} demands {n_repeated:,} items with its repeat counts multiplied out, "
            f"{MAX_REPEATED:,} are allowed: lower the counts"
        )


@lru_cache(maxsize=4096)
def _n_repeated(pattern: str) -> int:
    """How many items a pattern demands at least; a pattern that `re` would not compile raises what `re` raises."""
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    return _n_items(re._parser.parse(pattern, re.IGNORECASE | re.MULTILINE))  # pyright: ignore[reportAttributeAccessIssue]


def _n_items(part: Any) -> int:
    """The size of a part of a parsed pattern. A repeat is the tuple (least, most, part)."""
    if isinstance(part, tuple) and len(part) == 3 and isinstance(part[0], int) and isinstance(part[1], int):
        return max(1, part[0]) * _n_items(part[2])
    # A part that `re` parsed is a sequence of its own class.
    return sum(_n_items(p) for p in part) if isinstance(part, tuple | list) or hasattr(part, "getwidth") else 1


def _validate_count(body: Any) -> None:
    if not isinstance(body, Mapping) or "of" not in body:
        raise DataError(f"check 'count' wants {{'of': ..., 'min': n and/or 'max': n}}, got {body!r}")
    if unknown := set(body) - {"of", "min", "max"}:
        raise DataError(f"check 'count' has unknown keys {sorted(unknown)}, known: of, min, max")
    if not {"min", "max"} & set(body):
        raise DataError(f"check 'count' wants a 'min' or a 'max', got {body!r}")
    for bound in ("min", "max"):
        if bound in body and (isinstance(body[bound], bool) or not isinstance(body[bound], int) or body[bound] < 0):
            raise DataError(f"check 'count': {bound!r} must be a whole number of at least 0, got {body[bound]!r}")
    of = body["of"]
    if isinstance(of, Mapping) and set(of) == {"regex"}:
        _validate_regex(of["regex"])
    elif of not in _UNITS:
        raise DataError(f"check 'count' counts {', '.join(_UNITS)} or {{'regex': ...}}, got {of!r}")


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
        _check_time(deadline)
        found = _phrase(phrase).search(text, position)
        if found is None:
            return False
        position = found.end()
    return True


def _mentions(phrases: list[str], text: str, deadline: float, *, negated: bool) -> bool:
    for sentence in sentences(text):
        _check_time(deadline)
        negation = _NEGATION.search(sentence)
        # A phrase is negated from where the first negation ends. One search a sentence keeps this linear.
        begin = len(sentence) + 1 if negation is None else negation.end()
        for phrase in phrases:
            for found in _phrase(phrase).finditer(sentence):
                if (found.start() >= begin) == negated:
                    return True
                if not negated:
                    break  # the first one stands behind the negation, so all do
    return False


def holds(check: Mapping[str, Any], text: str) -> bool:
    """Whether a (valid) check holds on a text.

    Raises:
        CheckUndecided: when the text is longer than `MAX_TEXT_CHARS`, or the check takes longer than `CHECK_SECONDS`.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise CheckUndecided(f"got a text of {len(text):,} characters, checks read up to {MAX_TEXT_CHARS:,}")
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
            return any(_found(p, text, deadline) for p in body)
        case "all":
            return all(_found(p, text, deadline) for p in body)
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


def _found(phrase: str, text: str, deadline: float) -> bool:
    _check_time(deadline)
    return _phrase(phrase).search(text) is not None


class ChecksJudge:
    """The judge that runs each criterion's own check. Exact, free, and deterministic.

    A criterion without a check comes back unscored, and so does one whose check reached its limit of time or text.
    """

    name = "checks"
    identity = ("checks", CHECKS_VERSION)

    def judge(self, example: Example, response: str) -> Judgement:
        """One verdict a criterion, in the rubric's order."""
        problem, verdicts = "", []
        for criterion in example.rubric:
            if criterion.check is None:
                problem = problem or "no check"
                reason = "no programmatic check on this criterion: use an LLM judge"
                verdicts.append(Verdict(met=None, reason=reason))
                continue
            try:
                met = holds(criterion.check, response)
            except CheckUndecided as error:
                problem = "check limit"
                verdicts.append(Verdict(met=None, reason=str(error)))
            else:
                verdicts.append(Verdict(met=met, reason=f"check {next(iter(criterion.check))}"))
        return Judgement(verdicts, problem=problem)

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """The judgements of many responses, in their order."""
        judgements = []
        for i, (example, response) in enumerate(tasks):
            judgements.append(self.judge(example, response))
            if done is not None:
                done(i, judgements[-1])
        return judgements
