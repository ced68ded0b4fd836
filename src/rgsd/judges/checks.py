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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rgsd.errors import DataError
from rgsd.judges.judgement import Judgement, Task
from rgsd.rubrics import Example, Verdict

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
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE)


def validate(check: Any) -> None:
    """Refuse a malformed check, naming what is wrong with it.

    Raises:
        DataError: with the offending part and the form that is wanted.
    """
    if not isinstance(check, Mapping) or len(check) != 1:
        raise DataError(f"a check is an object with one key out of {', '.join(_KINDS)}; got {check!r}")
    ((kind, body),) = check.items()
    if kind in ("any", "all", "order", "negated", "affirmed"):
        if not isinstance(body, list) or not body or not all(isinstance(p, str) and p.strip(" *") for p in body):
            raise DataError(f"check {kind!r} wants a non-empty list of phrases, got {body!r}")
    elif kind == "regex":
        _validate_regex(body)
    elif kind == "count":
        _validate_count(body)
    elif kind in ("not", "starts", "ends"):
        validate(body)
    elif kind in ("every", "some"):
        if not isinstance(body, list) or not body:
            raise DataError(f"check {kind!r} wants a non-empty list of checks, got {body!r}")
        for part in body:
            validate(part)
    else:
        raise DataError(f"unknown check {kind!r}, known: {', '.join(_KINDS)}")


def _validate_regex(pattern: Any) -> None:
    try:
        _pattern(pattern)
    except (re.error, TypeError) as error:
        raise DataError(f"check 'regex' wants a regular expression, got {pattern!r}: {error}") from None


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


def _count(of: Any, text: str) -> int:
    if isinstance(of, Mapping):
        return len(_pattern(of["regex"]).findall(text))
    if of == "words":
        return len(re.findall(r"\w+(?:['.,-]\w+)*", text))
    if of == "sentences":
        return len(sentences(text))
    if of == "paragraphs":
        return len([p for p in re.split(r"\n\s*\n", text) if p.strip()])
    return len((_BULLET if of == "bullets" else _NUMBERED).findall(text))


def _in_order(phrases: list[str], text: str) -> bool:
    position = 0
    for phrase in phrases:
        found = _phrase(phrase).search(text, position)
        if found is None:
            return False
        position = found.end()
    return True


def _mentions(phrases: list[str], text: str, *, negated: bool) -> bool:
    for sentence in sentences(text):
        for phrase in phrases:
            for found in _phrase(phrase).finditer(sentence):
                if bool(_NEGATION.search(sentence[: found.start()])) == negated:
                    return True
    return False


def holds(check: Mapping[str, Any], text: str) -> bool:
    """Whether a (valid) check holds on a text."""
    return _holds(check, text.translate(PLAIN))


def _holds(check: Mapping[str, Any], text: str) -> bool:
    ((kind, body),) = check.items()
    match kind:
        case "any":
            return any(_phrase(p).search(text) for p in body)
        case "all":
            return all(_phrase(p).search(text) for p in body)
        case "order":
            return _in_order(body, text)
        case "regex":
            return _pattern(body).search(text) is not None
        case "count":
            return body.get("min", 0) <= _count(body["of"], text) <= body.get("max", float("inf"))
        case "not":
            return not _holds(body, text)
        case "every":
            return all(_holds(part, text) for part in body)
        case "some":
            return any(_holds(part, text) for part in body)
        case "starts" | "ends":
            parts = sentences(text)
            return bool(parts) and _holds(body, parts[0 if kind == "starts" else -1])
        case "negated" | "affirmed":
            return _mentions(body, text, negated=kind == "negated")
    raise DataError(f"unknown check {kind!r}, known: {', '.join(_KINDS)}")


class ChecksJudge:
    """The judge that runs each criterion's own check. Exact, free, and deterministic.

    A criterion without a check comes back unscored.
    """

    name = "checks"

    def judge(self, example: Example, response: str) -> Judgement:
        """One verdict a criterion, in the rubric's order."""
        verdicts = [
            Verdict(met=holds(c.check, response), reason=f"check {next(iter(c.check))}")
            if c.check is not None
            else Verdict(met=None, reason="no programmatic check on this criterion: use an LLM judge")
            for c in example.rubric
        ]
        return Judgement(verdicts, problem="" if all(v.is_scored for v in verdicts) else "no check")

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """The judgements of many responses, in their order."""
        judgements = []
        for i, (example, response) in enumerate(tasks):
            judgements.append(self.judge(example, response))
            if done is not None:
                done(i, judgements[-1])
        return judgements
