"""Reading which way round a pitfall is worded: is meeting it good, or bad?

RaR's pitfalls all carry a negative weight, and are worded both ways. "The response should avoid X" is met by a good
response (most of RaR-Science). "Recommends X" and "Does not mention Y" are met by a bad one (most of RaR-Medicine: its
generator was told to begin every pitfall with one of these two). So the wording decides, item by item.

The reader looks at the head of the sentence: its subject, then its first verb. It never guesses from the topic. Where
the wording leaves it open ("does not recommend X": is X good or bad?) it returns None, and the caller falls back to the
published sign and marks the criterion as assumed.
"""

from __future__ import annotations

import re
from typing import Literal

from rgsd.judges.checks import PLAIN

Reading = Literal["avoid", "commit"]
"""avoid: an instruction, meeting it is good. commit: the bad act itself, meeting it is bad."""


def _words(*lists: str) -> re.Pattern[str]:
    """Any of the words at the beginning of a text; "_" stands for the white space inside a phrase."""
    words = [word.replace("_", r"\s+") for words in lists for word in words.split()]
    return re.compile(rf"(?:{'|'.join(words)})\b")


def _verbs(*lists: str) -> str:
    """The verbs in all their regular forms, as a word list again."""
    return " ".join(_forms(verb) for verbs in lists for verb in verbs.split())


def _forms(verb: str) -> str:
    stem, _, tail = verb.partition("_")
    tail = f"_{tail}" if tail else ""
    if stem.endswith("e"):
        return f"{stem[:-1]}(?:e|es|ed|ing){tail}"
    if re.search(r"[^aeiou]y$", stem):
        return f"{stem[:-1]}(?:y|ies|ied|ying){tail}"
    # The last letter may be doubled: "omitting".
    return f"{stem}(?:e?s|{stem[-1]}?ed|{stem[-1]}?ing)?{tail}"


# What the verb is said of: "The (final) answer ...", "A response that ...", "It ...".
_SUBJECT = re.compile(
    r"(?:(?:an?|the|this|that|any|each|every)\s+)?"
    r"(?:(?:final|complete|correct|ideal|good|given|generated|model's|student's|assistant's|overall|written)\s+)*"
    r"(?:response|answer|explanation|solution|discussion|reasoning|argument|derivation|analysis|output|reply|student"
    r"|model|assistant|calculation|respondent|responder|they|it|one)s?\s+(?:that\s+|which\s+)?"
)
_ADVERBS = re.compile(r"(?:(?:also|explicitly|clearly|always|actually|specifically|ever|at\s+all)\s+)+")

_MODAL = _words("should must shall ought_to needs?_to has_to have_to (?:is|are)_(?:expected|required)_to")
_PENALISED = re.compile(
    r"\s+(?:be|lose|receive)\s+(?:penali[sz]ed|marked\s+down|downgraded|points?|(?:considered|deemed)\s+(?:in|un|wrong))"
)
_MAY = _words("may might could can would will")
_NOT = re.compile(r"(?:do|does|did)\s*(?:not|n't)\b|(?:cannot|can't|can\s+not|never|not)\b")
_SHOULD_NOT = re.compile(
    r"(?<!which )(?<!that )(?<!who )\b(?:should|must|shall|ought\s+to|(?:is|are)\s+to)\s+(?:\w+\s+)?"
    r"(?:not|never|avoid|refrain|be\s+avoided)\b"
)
_ACT_AS_SUBJECT = re.compile(r"\w+(?:ing|ion|ure)\b|(?:any|use|units?|values?)\b")

# Virtues: a pitfall that begins with one is worded as what to do.
_AVOID = _words(
    _verbs("avoid refrain abstain prevent warn caution ensure remain maintain keep stay clarify acknowledge"),
    _verbs("distinguish differentiate steer_clear guard_against make_sure watch_out"),
    "avoidance beware correctly accurately properly appropriately free_(?:of|from)",
    "(?:be|is|are)_(?:careful|cautious|free_(?:of|from)) (?:care|caution)_(?:should|must)",
    "(?:it_)?is_(?:important|crucial|essential|vital|necessary|critical) there_(?:should|must)_be_no",
    "no_(?:mention_of|confusion|unnecessary|irrelevant|extraneous|incorrect)",
)

# Faults: an omission or a wrong act, whatever its object.
_FAULT_VERBS = _verbs(
    "fail omit neglect overlook ignore miss forget lack skip leave_out disregard dismiss downplay confuse conflate",
    "mistake contradict violate invent fabricate hallucinate exaggerate speculate deviate digress jump mix_up swap",
    "reverse assume presume make_up equate double-count delay withhold rely",
)
_FAULTS = (
    r"failures? omissions? absence confusion mistakenly mis(?!s)\w+ overly excessive(?:ly)? unnecessar(?:y|ily) unclear"
    r" incorrect(?:ly)? wrong(?:ly)? erroneous(?:ly)? improper(?:ly)? inappropriate(?:ly)? inaccurate(?:ly)?"
    r" false(?:ly)? premature(?:ly)? vague(?:ly)? too only merely solely"
    r" over(?:stat|emphasi|simplif|generali|complicat|estimat|rel|us|interpret)\w* under(?:stat|emphasi|estimat)\w*"
    r" (?:is|are)_(?:too|overly|excessively|unnecessarily|vague|unclear|incomplete|incorrect|wrong)"
    r" (?:an?_)?(?:common|potential|typical|frequent)_(?:mistake|error|pitfall|misconception)s?"
)
_BAD = _words(_FAULT_VERBS, _FAULTS)

# Neutral acts: at the head of a pitfall ("Recommends X", "States that X") they say what a bad response does.
_ACT = _words(
    _verbs(
        "recommend suggest advise prescribe propose advocate encourage endorse promote state claim assert say conclude",
        "attribute identify include introduce provide add use apply focus give present mention describe indicate imply",
        "treat round contain offer classify consider select choose diagnose label interpret infer generalise",
        "generalize repeat answer administer initiate start discuss refer_to define list base calculate switch perform",
        "rule_out",
    ),
    "notes noting",
)

# After "does not", these left undone are the fault itself: "Does not mention the risk of ...".
_PUTS_IN = "mention state list discuss describe include provide reference cite give offer present"
_DUTY = _words(
    _PUTS_IN,
    "identify address note specify explain highlight emphasi[sz]e stress clarify indicate recogni[sz]e acknowledge",
    "consider account distinguish differentiate define justify show derive verify check convert calculate compute",
    "ensure warn caution inform cover report outline elaborate connect link relate answer point_out demonstrate",
    "support assess evaluate interpret rule_out monitor follow take_into_account make_(?:it_)?clear",
    "correctly accurately adequately clearly explicitly sufficiently fully properly",
)
# Of those, the ones whose object may be the fault: "Does not include irrelevant detail".
_INSERTS = _words(_PUTS_IN)
# After "does not", whether these left undone are good depends on the object: the wording does not decide.
_OPEN = _words(
    "recommend suggest advise prescribe propose advocate encourage use apply perform administer start initiate order"
)
_FAULTY_OBJECT = re.compile(
    r"\w+\s+(?:(?:any|an?|other|additional|overly|the\s+use\s+of)\s+)*"
    r"(?:irrelevant|unnecessary|extraneous|incorrect|wrong|unrelated|misleading|inaccurate|unsupported|false|erroneous"
    r"|superfluous|redundant|inappropriate|unsafe|harmful|contraindicated|excessive|outdated|unproven|dangerous"
    r"|speculative|contradictory|delay\w*|withhold\w*|ignor\w+|avoid\w*|stopping)\b"
)
_WRONGLY = _words(
    "incorrectly inappropriately inaccurately wrongly falsely erroneously mistakenly improperly unnecessarily",
    "prematurely overly simply merely just only solely automatically blindly arbitrarily",
)


def read(text: str) -> Reading | None:
    """How a pitfall's text, without its label, is worded.

    Args:
        text: e.g. "The response should avoid rounding early" or "Recommends antibiotics".

    Returns:
        "avoid" when meeting it is good, "commit" when meeting it is bad, None when the wording does not say.
    """
    plain = " ".join(text.translate(PLAIN).lower().split()).lstrip("-*• ")
    subject = _SUBJECT.match(plain)
    rest = plain[subject.end() :] if subject else plain
    if adverbs := _ADVERBS.match(rest):
        rest = rest[adverbs.end() :]
    if modal := _MODAL.match(rest):
        return "commit" if _PENALISED.match(rest, modal.end()) else "avoid"
    if may := _MAY.match(rest):
        return _possible(rest[may.end() :].lstrip())
    if negation := _NOT.match(rest):
        return _negated(negation.group(), rest[negation.end() :].lstrip(), has_subject=subject is not None)
    return _head(rest)


def _head(rest: str) -> Reading | None:
    """A sentence that begins with its verb, a gerund or a noun."""
    # "Confusing mass with weight should be avoided": the act is the subject of an instruction.
    if _ACT_AS_SUBJECT.match(rest) and _SHOULD_NOT.search(rest):
        return "avoid"
    if _AVOID.match(rest):
        return "avoid"
    if _BAD.match(rest) or _ACT.match(rest):
        return "commit"
    return "avoid" if _SHOULD_NOT.search(rest) else None


def _possible(rest: str) -> Reading | None:
    """After "may", "might", "could": a fault that may happen, or nothing said."""
    return "commit" if _NOT.match(rest) or _BAD.match(rest) or _WRONGLY.match(rest) else None


def _negated(word: str, rest: str, *, has_subject: bool) -> Reading | None:
    """After "does not", "do not", "never", "not"."""
    # Without a subject, "do not" and "never" are imperatives: instructions.
    if not has_subject and re.match(r"do\b|don't|never", word):
        return "avoid"
    # "Not mentioning the risk" names an omission; "not to round early" instructs.
    if word == "not" and re.match(r"\w+ing\b", rest):
        return "avoid" if _BAD.match(rest) else "commit"
    # "does not overlook X": two negatives.
    if word == "never" or _WRONGLY.match(rest) or _BAD.match(rest):
        return "avoid"
    if (_INSERTS.match(rest) or _OPEN.match(rest)) and _FAULTY_OBJECT.match(rest):
        return "avoid"
    if _DUTY.match(rest):
        return "commit"
    return None if _OPEN.match(rest) else "avoid"
