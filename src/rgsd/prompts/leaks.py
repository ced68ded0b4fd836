"""The leak meter: whether a response mentions the rubric that it should follow silently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from rgsd.errors import ConfigError

_THE = r"(?:the|this|these|those|your|each|every|all|all of the|all these|all the|both)"
_GRADING = r"(?:evaluation|evaluative|grading|scoring|assessment|marking|judging|rubric)"
# Not "following" or "above": "the following criteria" are a list in the response itself.
_GIVEN = r"(?:given|provided|listed|stated|specified|required|requested|hidden)"
_CRITERIA = r"criteri(?:a|on)\b"
# "the criteria for admission" are not the rubric's, but "the criteria for this response" are.
_NOT_FOR = (
    r"(?!\s+(?:for|of|to|used|in|that|by)\b(?!\s+(?:(?:judge|evaluate|grade|score|assess)\w*\s+)?"
    r"(?:this|the|my|your|a good)\s+(?:response|answer|question|prompt)\b))"
)
_REQUIRE = r"(?:requir|ask|demand|specif|stat|request|want|suggest|call|expect|instruct)\w*"

LEAK_PATTERNS: tuple[str, ...] = (
    # "the rubric", "a rubric", except in the idiom "under the rubric of".
    r"(?<!under the )(?<!under this )\brubrics?\b",
    # A weight, as the teacher's prompt may show it.
    r"\[\s*weight\s*=",
    # A pitfall's numbered line, copied from the teacher's prompt.
    r"(?m:^)\s*\d+\.\s+mistake to avoid:",
    # "hidden criteria", "hidden evaluation criteria", "hidden requirements".
    r"\bhidden\s+(?:\w+\s+)?(?:criteri(?:a|on)|requirements?|checklist|instructions?)\b",
    # "the evaluation criteria", "these grading criteria", "the scoring criteria".
    rf"\b{_THE}\s+(?:{_GIVEN}\s+)?{_GRADING}\s+{_CRITERIA}{_NOT_FOR}",
    # "evaluation criterion 3", "criterion 3", "criteria 1 and 2", "criterion #4".
    r"\bcriteri(?:on|a)\s+(?:#\s*|no\.?\s*|number\s+)?\d+\b",
    # "as the criteria require", "as required by the criteria".
    rf"\bas\s+(?:{_THE}\s+)?(?:{_GIVEN}\s+)?{_CRITERIA}\s+{_REQUIRE}",
    rf"\bas\s+{_REQUIRE}\s+(?:by|in)\s+{_THE}\s+(?:{_GIVEN}\s+)?{_CRITERIA}{_NOT_FOR}",
    # "the criteria ask for", "the listed criteria want".
    rf"\b{_THE}\s+(?:{_GIVEN}\s+)?{_CRITERIA}\s+(?:ask|want|call for|request|demand|expect|instruct)\w*",
    # "according to the criteria", "per the given criteria", "to satisfy all the criteria".
    r"\b(?:according to|based on|in line with|per|following|in accordance with|guided by|in keeping with"
    rf"|to (?:satisfy|address|fulfil|fulfill|cover))\s+{_THE}\s+(?:{_GIVEN}\s+)?{_CRITERIA}{_NOT_FOR}",
    # "this response addresses all the criteria", "I have covered each criterion".
    r"\b(?:I|I've|I'll|I have|I will|(?:this|my|the) (?:response|answer|explanation))\s+(?:\w+\s+)?"
    rf"(?:address|cover|meet|satisf|fulfil|follow)\w*\s+{_THE}\s+(?:{_GIVEN}\s+)?{_CRITERIA}{_NOT_FOR}",
    # "the given criteria", "the provided criteria", "the criteria provided", "the criteria I was given".
    rf"\b{_THE}\s+(?:given|provided|listed|stated|hidden)\s+{_CRITERIA}{_NOT_FOR}",
    rf"\b{_THE}\s+{_CRITERIA}\s+(?:(?:that\s+)?(?:I was|you)\s+(?:given|gave|provided|listed|set)|provided|you)\b",
    # "the grading instructions", "the scoring guidelines"; "this answer will be graded".
    r"\b(?:the|these|this) (?:grading|scoring|marking) (?:instructions?|guidelines?|guide|checklist|key)\b",
    r"\b(?:this|my) (?:response|answer) (?:will|is going to|is to|is) be(?:ing)? (?:graded|scored|evaluated|judged)\b",
    r"\bthe (?:graders?|evaluators?) (?:will|wants?|is looking|are looking|looks?|expects?|checks?)\b",
    # "I was asked to cover", "I've been told not to mention", "I am instructed to include".
    r"\bI(?: was|'m| am|'ve been| have been) (?:asked|told|instructed|required|supposed) (?:not )?to "
    r"(?:not |never |also )?(?:cover|address|include|mention|avoid|reveal|discuss|satisfy|meet)\b",
    # "the points I was given", "the points you asked me to cover".
    r"\bthe (?:points|items|requirements) (?:that )?(?:I was|I am|I've been|you) (?:given|told|asked|supposed|gave)\b",
    # With a reference as privileged context: "the reference response", "the reference answer".
    r"\bthe (?:given |provided )?reference (?:response|answer)\b",
)
"""Regular expressions for responses that mention the rubric, ignoring case. See `mentions_rubric` for exemptions."""

_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
# The words that make a match a leak, unless the conversation has brought them up itself.
_TELLING = re.compile(r"rubric|criteri|evaluat|grad(?:e|ing)|scor|assess|mark|hidden|checklist|weight|reference")
# "Jones criteria", "criteria for sepsis", "the following criteria": a response that introduces its own criteria may
# refer to them later.
_OWN_CRITERIA = re.compile(
    rf"\b(?!(?:the|this|these|those|your|each|every|all|both|any|some|which|what|of|as|per|and|or|to|by|with|{_GIVEN}"
    rf"|{_GRADING})\b)[\w'/-]+\s+criteri(?:a|on)\b(?!\s*(?:#|no\.?|number)?\s*\d)"
    r"|\bcriteri(?:a|on)\s+(?:for|of|to|used|in)\b(?!\s+(?:(?:judge|evaluate|grade|score|assess)\w*\s+)?"
    r"(?:this|the|my|your|a good)\s+(?:response|answer|question|prompt)\b)",
    re.IGNORECASE,
)


def mentions_rubric(response: str, question: str = "", patterns: Sequence[str] = LEAK_PATTERNS) -> bool:
    """Whether a response mentions the rubric or its criteria. Pass the response without its reasoning.

    This is a meter to compare runs, and no proof about a single response: it knows wordings, not meanings.

    A match does not count if

    - the same pattern matches the question, because the user brought it up;
    - its telling words ("rubric", "hidden", "grading", ..., or "criteria" if there is no other) are in the question: a
      user who asks for diagnostic criteria gets an answer "according to the criteria";
    - its only telling word is "criteria", and the response names criteria of its own field ("the Jones criteria").

    Args:
        response: The text of the response.
        question: The user's turn, or all turns.
        patterns: Regular expressions. Case is ignored.
    """
    question, response = question.replace(_APOSTROPHE, "'"), response.replace(_APOSTROPHE, "'")
    known = set(_TELLING.findall(question.casefold()))
    if _OWN_CRITERIA.search(response):
        known.add("criteri")
    return any(_leaks(_pattern(p), response, question, known) for p in patterns)


def _leaks(pattern: re.Pattern[str], response: str, question: str, known: set[str]) -> bool:
    if question and pattern.search(question):
        return False
    for match in pattern.finditer(response):
        telling = set(_TELLING.findall(match.group().casefold()))
        # In "the scoring criteria" the telling word is "scoring". "Criteria" counts only if there is no other.
        telling = telling - {"criteri"} or telling
        if not telling or telling - known:
            return True
    return False


@lru_cache(maxsize=256)
def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"leak pattern {pattern!r} is not a valid regular expression: {error}") from error
