"""Read the wording of a RaR pitfall: an instruction, the fault of a bad response, or neither.

A good response meets "The response should avoid X"; a bad one meets "Recommends X" and "Omits Y". `read` looks only at
the description; `rgsd.data.schemas.polarity` adds the title and the rest of the row.
"""

from __future__ import annotations

import re
from typing import Literal

from rgsd.rubrics.checks import PLAIN

Reading = Literal["avoid", "commit"]
"""avoid: the text is an instruction, and meeting it is good. commit: it names the fault, and meeting it is bad."""


def words(*lists: str) -> re.Pattern[str]:
    """A pattern for any of the words at the start of a text. "_" is white space inside a phrase."""
    alternatives = [word.replace("_", r"\s+") for text in lists for word in text.split()]
    return re.compile(rf"(?:{'|'.join(alternatives)})\b")


def verbs(*lists: str) -> str:
    """The verbs in all their regular forms, as a list for `words`."""
    return " ".join(_forms(verb) for text in lists for verb in text.split())


def _forms(verb: str) -> str:
    stem, _, tail = verb.partition("_")
    tail = f"_{tail}" if tail else ""
    if stem.endswith("e"):
        return f"{stem[:-1]}(?:e|es|ed|ing){tail}"
    if re.search(r"[^aeiou]y$", stem):
        return f"{stem[:-1]}(?:y|ies|ied|ying){tail}"
    # The last letter can be doubled, as in "omitting".
    return f"{stem}(?:e?s|{stem[-1]}?ed|{stem[-1]}?ing)?{tail}"


# The subject: "The (final) answer ...", "A response that ...", "It ...".
_SUBJECT = re.compile(
    r"(?:(?:an?|the|this|that|any|each|every)\s+)?"
    r"(?:(?:final|complete|correct|ideal|good|given|generated|model's|student's|assistant's|overall|written)\s+)*"
    r"(?:response|answer|explanation|solution|discussion|reasoning|argument|derivation|analysis|output|reply|student"
    r"|model|assistant|calculation|respondent|responder|they|it|one)s?\s+(?:that\s+|which\s+)?"
)
_ADVERBS = re.compile(r"(?:(?:also|explicitly|clearly|always|actually|specifically|ever|at\s+all)\s+)+")

MODAL = words("should must shall ought_to needs?_to has_to have_to (?:is|are)_(?:expected|required)_to")
_PENALISED = re.compile(
    r"\s+(?:be|lose|receive)\s+(?:penali[sz]ed|marked\s+down|downgraded|points?|(?:considered|deemed)\s+(?:in|un|wrong))"
)
_MAY = words("may might could can would will")
_NOT = re.compile(r"(?:do|does|did)\s*(?:not|n't)\b|(?:cannot|can't|can\s+not|never|not)\b")
_SHOULD_NOT = re.compile(
    r"(?<!which )(?<!that )(?<!who )\b(?:should|must|shall|ought\s+to|(?:is|are)\s+to)\s+(?:\w+\s+)?"
    r"(?:not|never|avoid|refrain|be\s+avoided)\b"
)
_ACT_AS_SUBJECT = re.compile(r"\w+(?:ing|ion|ure)\b|(?:any|use|units?|values?)\b")

# Virtues. A pitfall that starts with one is worded as an instruction.
AVOID = words(
    verbs("avoid refrain abstain prevent warn caution ensure remain maintain keep stay clarify acknowledge"),
    verbs("distinguish differentiate steer_clear guard_against make_sure watch_out"),
    "avoidance beware correctly accurately properly appropriately free_(?:of|from)",
    "(?:be|is|are)_(?:careful|cautious|wary|mindful|aware|free_(?:of|from)) (?:care|caution)_(?:should|must)",
    "(?:it_)?is_(?:important|crucial|essential|vital|necessary|critical) there_(?:should|must)_be_no",
    "no_(?:mention_of_(?:any_)?)?(?:confusion|unnecessary|irrelevant|unrelated|extraneous|incorrect|wrong)",
    r"no_(?:\w+_){0,2}(?:errors?|mistakes?|omissions?|contradictions?|misconceptions?|misinterpretations?)",
)

# Faults: omissions and wrong acts, whatever their object.
_FAULT_VERBS = verbs(
    "fail omit neglect overlook ignore miss forget lack skip leave_out disregard dismiss downplay confuse conflate",
    "mistake contradict violate invent fabricate hallucinate exaggerate speculate deviate digress jump mix_up swap",
    "reverse assume presume make_up equate double-count delay withhold rely",
)
_FAULTS = (
    r"failures? omissions? absence confusion mistakenly mis(?!s(?:es|ed|ing)?\b)\w+ overly excessive(?:ly)?"
    r" unnecessar(?:y|ily) unclear"
    r" incorrect(?:ly)? wrong(?:ly)? erroneous(?:ly)? improper(?:ly)? inappropriate(?:ly)? inaccurate(?:ly)?"
    r" false(?:ly)? premature(?:ly)? vague(?:ly)? too only merely solely"
    r" over(?:stat|emphasi|simplif|generali|complicat|estimat|rel|us|interpret)\w* under(?:stat|emphasi|estimat)\w*"
    r" (?:is|are)_(?:too|overly|excessively|unnecessarily|vague|unclear|incomplete|incorrect|wrong)"
    r" (?:an?_)?(?:common|potential|typical|frequent)_(?:mistake|error|pitfall|misconception)s?"
)
BAD = words(_FAULT_VERBS, _FAULTS)

# Neutral acts. At the start of a pitfall ("Recommends X", "States that X"), they name what a bad response does.
ACT = words(
    verbs(
        "recommend suggest advise prescribe propose advocate encourage endorse promote state claim assert say conclude",
        "attribute identify include introduce provide add use apply focus give present mention describe indicate imply",
        "treat round contain offer classify consider select choose diagnose label interpret infer generalise",
        "generalize repeat answer administer initiate start discuss refer_to define list base calculate switch perform",
        "rule_out draw reach place put order assign employ invoke report cite focus rank",
    ),
    "notes noting mak(?:e|es|ing)_(?!(?:it_)?clear|sure|no\\b)",
)

# Acts that are a fault if left undone, as in "Does not mention the risk of ...".
_PUTS_IN = "mention state list discuss describe include provide reference cite give offer present"
_DUTY = words(
    _PUTS_IN,
    "identify address note specify explain highlight emphasi[sz]e stress clarify indicate recogni[sz]e acknowledge",
    "consider account distinguish differentiate define justify show derive verify check convert calculate compute",
    "ensure warn caution inform cover report outline elaborate connect link relate answer point_out demonstrate",
    "support assess evaluate interpret rule_out monitor follow take_into_account make_(?:it_)?clear",
    "correctly accurately adequately clearly explicitly sufficiently fully properly",
)
# Those of them whose object can be the fault, as in "Does not include irrelevant detail".
_INSERTS = words(_PUTS_IN)
# After "does not", only the object of these tells whether it is good to leave them undone.
_OPEN = words(
    "recommend suggest advise prescribe propose advocate encourage use apply perform administer start initiate order"
)
FAULTY_OBJECT = re.compile(
    r"\w+\s+(?:(?:any|an?|other|additional|overly|the\s+use\s+of)\s+)*"
    r"(?:irrelevant|unnecessary|extraneous|incorrect|wrong|unrelated|misleading|inaccurate|unsupported|false|erroneous"
    r"|superfluous|redundant|inappropriate|unsafe|harmful|contraindicated|excessive|outdated|unproven|dangerous"
    r"|speculative|contradictory|delaying|ignor\w+)\b"
)
_ADDS_NOTHING_WRONG = re.compile(
    r"\w+(?:s|ing)\s+no\s+(?:\w+\s+)?(?:unnecessary|irrelevant|extraneous|unrelated|unsupported|incorrect|false|misleading)\b"
)
# The text names a mistake, and then says to avoid it.
_MISTAKE_TO_AVOID = re.compile(
    r"\b(?:mistakes?|errors?|pitfalls?|misconceptions?|traps?|oversights?)\s+(?:(?:that|which)\s+)?"
    r"(?:(?:should|must|needs?\s+to|has\s+to|have\s+to|is|are)\s+)?(?:to\s+)?(?:be\s+)?avoid(?:ed)?\b"
)
_THEN_AVOID = re.compile(
    r"[;.,]\s+(?:so\s+|and\s+|but\s+)?(?:the\s+|an?\s+|any\s+)?(?:\w+\s+)?(?:response|answer|explanation|solution|student)s?"
    r"\s+(?:should|must|needs?\s+to|has\s+to)\s+(?:\w+\s+)?(?:avoid|not|never|refrain|guard)\b"
)
# "Unnecessary tests should be avoided", but not "Incorrectly states that X should be avoided".
_TO_BE_AVOIDED = re.compile(
    r"(?:(?!\b(?:that|which|who|stat|claim|recommend|suggest|say|advis|assert|conclud)\w*)[^,;.]){1,100}?"
    r"\b(?:should|must|needs?\s+to|has\s+to|have\s+to|ought\s+to|is\s+to|are\s+to)\s+be\s+(?:avoided|prevented|excluded)\b"
)
_FAULT_NOUN = re.compile(
    r"(?:(?:an?|the|any|common|arithmetic|sign|unit|calculation|computational|conceptual|logical|factual|rounding|algebraic"
    r"|conversion|numerical|potential)\s+)*(?:errors?|mistakes?|misconceptions?|inconsistenc(?:y|ies)|contradictions?"
    r"|ambiguit(?:y|ies)|inaccurac(?:y|ies)|lack)\b"
)
_IS_MISSING = re.compile(
    r"(?:\w+\s+){1,5}(?:is|are)\s+(?:missing|absent|omitted|ignored|neglected|overlooked|confused|misstated"
    r"|not\s+(?:given|stated|mentioned|included|provided|explained|addressed|considered))\b"
)
# "Penalize responses that ...", "Deduct points if the answer ...": what follows is the fault.
_PENALTY = re.compile(
    r"(?:penali[sz]es?|deducts?\s+points?|subtracts?\s+points?|flags?|marks?\s+down|downgrades?|loses?\s+points?)\s+"
    r"(?:(?:any|an?|the|for|if|when)\s+)*"
)
WRONGLY = words(
    "incorrectly inappropriately inaccurately wrongly falsely erroneously mistakenly improperly unnecessarily",
    "prematurely overly simply merely just only solely automatically blindly arbitrarily",
)


def read(text: str) -> Reading | None:
    """Read the polarity from the wording of a pitfall, without its label.

    Args:
        text: For example "The response should avoid rounding early" or "Recommends antibiotics".

    Returns:
        "avoid" if meeting it is good, "commit" if meeting it is bad, None if the wording does not tell.
    """
    whole = plain(text)
    rest = without_subject(whole)
    if modal := MODAL.match(rest):
        return "commit" if _PENALISED.match(rest, modal.end()) else "avoid"
    if may := _MAY.match(rest):
        return _possible(rest[may.end() :].lstrip())
    if negation := _NOT.match(rest):
        has_subject = _SUBJECT.match(whole) is not None
        return _negated(negation.group(), rest[negation.end() :].lstrip(), has_subject=has_subject)
    if penalty := _PENALTY.match(rest):
        return "commit" if _head(without_subject(rest[penalty.end() :])) == "commit" else None
    return _head(rest)


def plain(text: str) -> str:
    """The text in lower case, with plain quotes and dashes and single spaces, without a bullet."""
    return " ".join(text.translate(PLAIN).lower().split()).lstrip("-*• ")


def without_subject(text: str) -> str:
    """The text without its subject ("The response", ...) and without leading adverbs."""
    subject = _SUBJECT.match(text)
    rest = text[subject.end() :] if subject else text
    adverbs = _ADVERBS.match(rest)
    return rest[adverbs.end() :] if adverbs else rest


def _head(rest: str) -> Reading | None:
    """Read a text that starts with a verb, a gerund or a noun."""
    # "Confusing mass with weight should be avoided": the fault is the subject of an instruction.
    if _ACT_AS_SUBJECT.match(rest) and _SHOULD_NOT.search(rest):
        return "avoid"
    if AVOID.match(rest) or _ADDS_NOTHING_WRONG.match(rest) or _MISTAKE_TO_AVOID.search(rest):
        return "avoid"
    if _THEN_AVOID.search(rest):
        return None if ACT.match(rest) else "avoid"
    if _TO_BE_AVOIDED.match(rest) and not ACT.match(rest):
        return "avoid"
    if BAD.match(rest) or ACT.match(rest):
        return "commit"
    if _SHOULD_NOT.search(rest):
        return "avoid"
    return "commit" if _FAULT_NOUN.match(rest) or _IS_MISSING.match(rest) else None


def _possible(rest: str) -> Reading | None:
    """Read what follows "may", "might" or "could": a possible fault, or nothing that tells."""
    return "commit" if _NOT.match(rest) or BAD.match(rest) or WRONGLY.match(rest) else None


def _negated(word: str, rest: str, *, has_subject: bool) -> Reading | None:
    """Read what follows "does not", "do not", "never" or "not"."""
    # Without a subject, "do not" and "never" are imperatives, that is, instructions.
    if not has_subject and re.match(r"do\b|don't|never", word):
        return "avoid"
    # "Not mentioning the risk" names an omission; "not to round early" is an instruction.
    if word == "not" and re.match(r"\w+ing\b", rest):
        return "avoid" if BAD.match(rest) else "commit"
    # "does not overlook X" is a double negative.
    if word == "never" or WRONGLY.match(rest) or BAD.match(rest):
        return "avoid"
    if (_INSERTS.match(rest) or _OPEN.match(rest)) and FAULTY_OBJECT.match(rest):
        return "avoid"
    # "Does not remain concise", "does not avoid jargon".
    if _DUTY.match(rest) or AVOID.match(rest):
        return "commit"
    return None if _OPEN.match(rest) else "avoid"
