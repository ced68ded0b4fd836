"""Reading which way round a pitfall is worded: is meeting it good, or bad?

RaR's pitfalls all carry a negative weight, and are worded both ways. "The response should avoid X" is met by a good
response (most of RaR-Science). "Recommends X" and "Does not mention Y" are met by a bad one (most of RaR-Medicine, whose
generator was told to begin every pitfall with one of these two). So the wording decides, item by item.

The reader looks at the head of the sentence: its subject, then its first verb. It never guesses from the topic. Where
the wording leaves it open ("does not recommend X": is X good or bad?) it says so by returning None, and the caller falls
back to the sign and marks the criterion as assumed.
"""

from __future__ import annotations

import re
from typing import Literal

Reading = Literal["avoid", "commit"]
"""avoid: an instruction, meeting it is good. commit: the bad act itself, meeting it is bad."""

_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "\u00a0": " "})  # noqa: RUF001


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{'|'.join(pattern.split())})\b")


# "The (final) answer ...", "A response that ...", "It ...": what the verb is said of.
_SUBJECT = re.compile(
    r"(?:(?:an?|the|this|that|any|each|every)\s+)?"
    r"(?:(?:final|complete|correct|ideal|good|given|generated|model's|student's|assistant's|overall|written)\s+)*"
    r"(?:responses?|answers?|explanations?|solutions?|discussions?|reasoning|arguments?|derivations?|analysis|outputs?"
    r"|reply|replies|students?|models?|assistants?|calculations?|respondents?|responders?|they|it|one)\s+(?:that\s+|which\s+)?"
)
_ADVERBS = re.compile(r"(?:(?:also|explicitly|clearly|always|simply|just|merely|ever|at\s+all|actually|specifically)\s+)+")

_MODAL = re.compile(r"(?:should|must|shall|ought\s+to|needs?\s+to|ha(?:s|ve)\s+to|(?:is|are)\s+(?:expected|required)\s+to)\b")
_PENALISED = re.compile(
    r"\b(?:be|lose|receive)\s+(?:penali[sz]ed|marked\s+down|downgraded|points?|(?:considered|deemed)\s+(?:in|wrong|un))"
)
_MAY = re.compile(r"(?:may|might|could|can|would|will)\b")
_NOT = re.compile(r"(do(?:es)?|did)\s*(?:not|n't)\b|(don't|doesn't|didn't)\b|(cannot|can't|can\s+not)\b|(never|not)\b")
_SHOULD_NOT = re.compile(
    r"(?<!which )(?<!that )(?<!who )\b(?:should|must|shall|ought\s+to|(?:is|are)\s+to)\s+(?:\w+\s+)?"
    r"(?:not|never|avoid|refrain|be\s+avoided)\b"
)

# Said of the response, these are virtues: a pitfall that begins so is worded as what to do.
_AVOID = _words(
    r"avoid(?:s|ed|ing|ance)? refrain(?:s|ed|ing)? abstain(?:s|ing)? steers?\s+clear prevent(?:s|ing)? guard(?:s|ing)?\s+against"
    r" warn(?:s|ing)? caution(?:s|ing)? beware watch\s+out ensur(?:e|es|ing) makes?\s+sure remain(?:s|ing)? maintain(?:s|ing)?"
    r" keep(?:s|ing)? stay(?:s|ing)? correctly accurately properly appropriately clarif(?:y|ies) acknowledg(?:e|es)"
    r" distinguish(?:es)? differentiat(?:e|es) free\s+(?:of|from) (?:be|is|are)\s+(?:careful|cautious|free\s+(?:of|from))"
    r" care\s+(?:should|must) caution\s+(?:should|must) is\s+(?:important|crucial|essential|vital|necessary|critical)"
    r" there\s+(?:should|must)\s+be\s+no no\s+mention\s+of no\s+(?:confusion|unnecessary|irrelevant|extraneous|incorrect)"
)

# An omission, or a wrong act, whatever its object: stems that are bad in any form.
_BAD = _words(
    r"fail(?:s|ed|ing|ures?)? omit(?:s|ted|ting)? omissions? neglect(?:s|ed|ing)? overlook(?:s|ed|ing)? ignor(?:e|es|ed|ing)"
    r" miss(?:es|ed|ing)? forget(?:s|ting)? lack(?:s|ed|ing)? absence skip(?:s|ped|ping)? leav(?:e|es|ing)\s+out disregard(?:s|ing)?"
    r" dismiss(?:es|ing)? downplay(?:s|ing)? confus(?:e|es|ed|ing) confusion conflat(?:e|es|ing) mistak(?:e|es|ing|enly)"
    r" mis(?!s)\w+ incorrect(?:ly)? wrong(?:ly)? erroneous(?:ly)? improper(?:ly)? inappropriate(?:ly)? inaccurate(?:ly)? false(?:ly)?"
    r" over(?:stat|emphasi|simplif|generali|complicat|estimat|look|rel|us|interpret)\w* under(?:stat|emphasi|estimat)\w*"
    r" contradict(?:s|ing)? violat(?:e|es|ing) invent(?:s|ing)? fabricat(?:e|es|ing) hallucinat(?:e|es|ing) exaggerat(?:e|es|ing)"
    r" speculat(?:e|es|ing) deviat(?:e|es|ing) digress(?:es|ing)? jump(?:s|ing)? mix(?:es|ing)\s+up swap(?:s|ping)? revers(?:e|es|ing)"
    r" overly excessive(?:ly)? unnecessar(?:y|ily) unclear vague(?:ly)? (?:is|are)\s+(?:too|overly|excessively|unnecessarily|vague"
    r"|unclear|incomplete|incorrect|wrong) too premature(?:ly)? assum(?:e|es|ed|ing) presum(?:e|es|ing) mak(?:e|es|ing)\s+up"
    r" (?:an?\s+)?(?:common|potential|typical|frequent)\s+(?:mistake|error|pitfall|misconception)s?"
    r" equat(?:e|es|ing) double[-\s]count(?:s|ing)? delay(?:s|ing)? withhold(?:s|ing)? only merely solely rel(?:y|ies|ying)"
)

# Neutral acts: as the head of a pitfall ("Recommends X", "States that X") they describe what a bad response does.
_ACT = _words(
    r"recommend(?:s|ed|ing)? suggest(?:s|ed|ing)? advis(?:e|es|ed|ing) prescrib(?:e|es|ing) propos(?:e|es|ing) advocat(?:e|es|ing)"
    r" encourag(?:e|es|ing) endors(?:e|es|ing) promot(?:e|es|ing) stat(?:e|es|ed|ing) claim(?:s|ed|ing)? assert(?:s|ing)? sa(?:y|ys|ying)"
    r" conclud(?:e|es|ed|ing) attribut(?:e|es|ed|ing) identif(?:y|ies|ied|ying) includ(?:e|es|ed|ing) introduc(?:e|es|ing)"
    r" provid(?:e|es|ing) add(?:s|ing)? us(?:e|es|ed|ing) appl(?:y|ies|ying) focus(?:es|ing)? giv(?:e|es|ing) present(?:s|ing)?"
    r" mention(?:s|ed|ing)? describ(?:e|es|ing) indicat(?:e|es|ed|ing) impl(?:y|ies|ying) treat(?:s|ing)? round(?:s|ing)?"
    r" contain(?:s|ing)? offer(?:s|ing)? classif(?:y|ies|ying) consider(?:s|ing)? select(?:s|ing)? choos(?:e|es|ing) diagnos(?:e|es|ing)"
    r" label(?:s|ing|l?ing)? interpret(?:s|ing)? infer(?:s|ring)? generali[sz](?:e|es|ing) repeat(?:s|ing)? answer(?:s|ing)?"
    r" administer(?:s|ing)? initiat(?:e|es|ing) start(?:s|ing)? discuss(?:es|ing)? refer(?:s|ring)?\s+to defin(?:e|es|ing)"
    r" list(?:s|ing)? not(?:es|ing) bas(?:e|es|ing) calculat(?:e|es|ing) swit?ch(?:es|ing)? perform(?:s|ing)? rul(?:e|es|ing)\s+out"
)

# After "does not": leaving these undone is the fault itself ("Does not mention the risk of ...").
_DUTY = _words(
    r"mention state identify address note specify list discuss explain describe include provide highlight emphasi[sz]e stress"
    r" clarify indicate recogni[sz]e acknowledge consider account distinguish differentiate define justify show derive verify"
    r" check convert calculate compute ensure warn caution inform cover report outline elaborate connect link relate reference"
    r" cite answer give offer present point\s+out take\s+into\s+account demonstrate support assess evaluate interpret rule\s+out"
    r" monitor correctly accurately adequately clearly explicitly sufficiently fully properly make\s+(?:it\s+)?clear follow"
)
# Of those, the ones that merely put something in: what is put in may be the fault ("Does not include irrelevant detail").
_PUTS_IN = _words("mention state list discuss describe include provide reference cite give offer present")
# After "does not": whether leaving these undone is good depends on the object, so the wording does not decide.
_OPEN = _words("recommend suggest advise prescribe propose advocate encourage use apply perform administer start initiate order")
_FAULTY = re.compile(
    r"(?:any\s+|an?\s+|other\s+|additional\s+|overly\s+|the\s+use\s+of\s+)*"
    r"(?:irrelevant|unnecessary|extraneous|incorrect|wrong|unrelated|misleading|inaccurate|unsupported|false|erroneous|superfluous"
    r"|redundant|inappropriate|unsafe|harmful|contraindicated|excessive|outdated|unproven|dangerous|speculative|contradictory"
    r"|delay\w*|withhold\w*|ignor\w+|avoid\w*|stopping|discontinuing\s+without|self-\w+)\b"
)
_WRONGLY = re.compile(
    r"(?:in(?:correct|appropriate|accurate)ly|wrongly|falsely|erroneously|mistakenly|improperly|unnecessarily|prematurely"
    r"|overly|simply|merely|just|only|solely|automatically|blindly|arbitrarily)\b"
)


def read(text: str) -> Reading | None:
    """How a pitfall's text, without its label, is worded.

    Args:
        text: e.g. "The response should avoid rounding early" or "Recommends antibiotics".

    Returns:
        "avoid" when meeting it is good, "commit" when meeting it is bad, None when the wording does not say.
    """
    plain = " ".join(text.translate(_PLAIN).lower().split()).lstrip("-*• ")
    subject = _SUBJECT.match(plain)
    rest = plain[subject.end() :] if subject else plain
    if adverbs := _ADVERBS.match(rest):
        rest = rest[adverbs.end() :]
    if modal := _MODAL.match(rest):
        return "commit" if _PENALISED.search(rest, modal.end()) else "avoid"
    if may := _MAY.match(rest):
        return _possible(rest[may.end() :].lstrip())
    if negation := _NOT.match(rest):
        return _negated(rest[negation.end() :].lstrip(), negation, has_subject=subject is not None)
    return _head(rest)


def _head(rest: str) -> Reading | None:
    """A sentence that begins with its verb, a gerund or a noun."""
    # "Confusing mass with weight should be avoided": a gerund as the subject of an instruction.
    if re.match(r"\w+(?:ing|ion|ure)\b|any\b|use\b|units?\b|values?\b", rest) and _SHOULD_NOT.search(rest):
        return "avoid"
    if _AVOID.match(rest):
        return "avoid"
    if _BAD.match(rest) or _ACT.match(rest):
        return "commit"
    return "avoid" if _SHOULD_NOT.search(rest) else None


def _possible(rest: str) -> Reading | None:
    """After "may", "might", "could": a fault that may happen, or nothing said."""
    if _NOT.match(rest) or _BAD.match(rest) or _WRONGLY.match(rest):
        return "commit"
    return None


def _negated(rest: str, negation: re.Match[str], *, has_subject: bool) -> Reading | None:
    """After "does not", "do not", "never"."""
    word = negation.group(0)
    # Without a subject, "do not" and "never" are imperatives: instructions.
    if not has_subject and word.startswith(("do not", "don't", "never")):
        return "avoid"
    # "Not mentioning the risk" names an omission; "not to round early" instructs.
    if word == "not" and re.match(r"\w+ing\b", rest):
        return "avoid" if _BAD.match(rest) else "commit"
    if word.startswith("never") or _WRONGLY.match(rest):
        return "avoid"
    # "does not overlook X": two negatives; "miss" and "fail" are in _BAD for the same reason.
    if _BAD.match(rest):
        return "avoid"
    if _PUTS_IN.match(rest) and _FAULTY.match(rest.partition(" ")[2]):
        return "avoid"
    if _DUTY.match(rest):
        return "commit"
    if _OPEN.match(rest):
        return "avoid" if _FAULTY.match(rest.partition(" ")[2]) else None
    return "avoid"
