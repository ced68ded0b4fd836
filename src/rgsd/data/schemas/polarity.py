"""Decide the polarity of a pitfall: whether meeting it is good or bad.

All pitfalls of RaR have a negative weight, but two kinds of wording. A good response meets "The response should avoid
X" (most of RaR-Science). A bad response meets "Recommends X" and "Omits Y" (most of RaR-Medicine). "Does not mention X"
can be both: bad if X belongs in the answer, and good if X is wrong.

There are three sources: the wording of the description (`polarity_wording.read`), the title ("Avoids ..." or "Omits
..."), and the rest of the row, which may ask for X or reject X. `decide` combines them. If they disagree, or none of
them tells, the polarity is undecided and the pitfall is left out, because an inverted pitfall teaches the opposite of
what its author meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rgsd.data.schemas.polarity_wording import (
    ACT,
    AVOID,
    BAD,
    FAULTY_OBJECT,
    MODAL,
    WRONGLY,
    Reading,
    plain,
    read,
    verbs,
    without_subject,
    words,
)

Decision = Literal["avoid", "commit", "disagree", "silent"]
"""The polarity of a pitfall. disagree: its sources contradict each other. silent: none of them tells."""

Naming = Literal["good", "no omission", "omission", "wrong act"]
"""What a title names: a virtue ("Avoids ..."), the virtue of leaving nothing out ("Avoids Overlooking ..."), an
omission ("Omits ..."), or a wrong act ("Misidentifies ...")."""

_IRRELEVANT = r"(?:irrelevant|unnecessary|extraneous|unrelated|superfluous|redundant|excessive|needless)"
_TITLE_LABEL = re.compile(r"(?:common\s+)?(?:pitfall|mistake|error)s?\s*[:-]\s*")
_TITLE_NO_OMISSION = re.compile(
    r"(?:avoid|prevent)\w*\s+(?:overlook|omi(?:t|ss)|miss(?:es|ed|ing)?\b|neglect|ignor|forget|fail|incomplete|insufficient)"
)
_TITLE_GOOD = re.compile(
    r"avoid(?:s|ing|ance)?\b|refrains?\b"
    r"|(?:no|without|free of|excludes?|rejects?|prevent(?:s|ing)?)\s+(?:(?:mention\s+of|discussion\s+of|\w+)\s+)?"
    r"(?:irrelevan|unnecessar|incorrect|wrong|inaccura|mislead|extraneous|unrelated|inappropriat|false|mis|over|unsupported"
    r"|confus|error|speculat|contradict|harmful|unsafe|invasive|alternative|exaggerat|premature|excessive|redundan|jargon"
    r"|assum|distract|contraindicat|outdated|obsolete|other\b)"
    rf"|(?:omits?|ignores?|skips?|omission\s+of|absence\s+of)\s+{_IRRELEVANT}\b"
    r"|(?:omits?|omission\s+of|absence\s+of)\s+(?:incorrect|wrong|misleading|inaccurate|outdated|unsupported)\b"
    r"|(?:common\s+)?(?:error|mistake|pitfall|confusion|mis\w+)s?\s+avoidance\b"
)
# Parts of an answer, as opposed to what happens to a patient: "Avoids Dehydration" does not praise leaving out fluids.
_TITLE_CONTENT = re.compile(
    r"\b(?:no|without|free|excludes?|rejects?|prevent\w*|omits?|ignores?|skips?|omission|absence|\w+\s+avoidance|common)\b"
    r"|\b(?:incorrect|wrong|inaccura|irrelevan|unnecessar|unrelated|extraneous|inappropriat|mislead|mis|over|confus|conflat"
    r"|err(?:or|on)|false|unsupported|unsafe|harmful|invasive|outdated|obsolete|exaggerat|premature|excess|redundan|jargon"
    r"|technical|assum|speculat|ambig|vague|contradict|alternative|other\b|non-|distract|red\s+herring|detail|diagnos|treat"
    r"|therap|test|imaging|investigation|drug|agent|medication|antibiotic|surg|procedure|option|advice|claim|recommend"
    r"|suggest|mention|information|content|condition|cause|finding|complex|off-topic|tangent|generic|guess|bias|unproven"
    r"|contraindicat|association)"
)
_TITLE_DELAY = re.compile(r"\bdelay")
_WAITS = re.compile(r"\b(?:delay|wait|postpon|defer|withhold|until|before)")
# "Does Not Mention X" only repeats its description, so it names nothing; "Does Not Confuse X" is a virtue.
_TITLE_NEGATED = re.compile(r"(?:does|do|must|should)\s+not\s+")
_TITLE_DUTY = words("address explain consider justify assess evaluate acknowledge clarify warn")
_TITLE_OMISSION = re.compile(
    r"omi(?:ts?|tted|tting|ssion)|miss(?:es|ing|ed)\b|lack(?:s|ing)?\b|fail|neglect|ignor|overlook|forget|skips?\b"
    r"|disregard|evasi|unhelpful|absen(?:t|ce)|incomplete|insufficient|inadequate|unaddressed|undermention|underestimat|unmentioned"
)
_TITLE_WRONG_ACT = re.compile(
    r"mis(?:identif|interpret|diagnos|attribut|stat|represent|classif|label|tak|us|understand|manag|calculat|appl)\w*"
    r"(?:ies|es|s|ying|ing)\b|(?:confuses|conflates|contradicts|dismisses|downplays|overstates|understates"
    r"|minimi[sz]es|withholds|delays|incorrectly|wrongly|inappropriately|unnecessarily|prematurely)\b"
)

_DOUBLE_NEGATIVE = re.compile(r"(?:do|does|did)\s*(?:not|n't)\s+|(?:never)\s+")
_NEVER = re.compile(r"never\s+\w+s\s+")
_UNSAID = re.compile(
    r"(?:(?:do|does|did)\s*(?:not|n't)|not|cannot|no)\s+(?:(?:explicitly|clearly|ever|specifically|also|even)\s+)*"
    r"(?P<verb>\w+)\s+(?:(?:or|and)\s+(?P<second>\w+)\s+)?(?P<object>.+)"
)
# Acts that are a fault if left undone, even if their object is wrong: a wrong thing should be explained too.
_ALWAYS_OWED = words(
    "explain distinguish differentiate clarify justify warn caution verify derive check define demonstrate ensure",
    "correctly accurately adequately sufficiently fully properly acknowledge recogni[sz]e",
)
_OWED_OBJECT = re.compile(
    r"(?:that\s+)?(?:(?:any|the|a|an|potential|possible|associated|patient|patients'|at\s+least\s+one)\s+)*"
    r"(?:importance|need|necessity|urgency|risks?|complications?|contraindications?|side\s+effects?|adverse\s+effects?"
    r"|limitations?|significance|reasons?|rationale|why|how|key|critical|crucial|essential|necessary|safety|monitoring"
    r"|follow[- ]up|informed\s+consent|ruling\s+out|excluding|checking|verifying|confirming|assessing|evaluating)\b"
)
# "Does not mention that X is contraindicated" omits a warning.
_OWED_WARNING = re.compile(
    r"that\s+.{1,120}?\b(?:(?:is|are)\s+(?:\w+\s+)?(?:contraindicated|harmful|dangerous|unsafe|(?:to\s+be\s+)?avoided)"
    r"|should\s+(?:be\s+avoided|not\b)|must\s+not\b|(?:can|may)\s+(?:cause|worsen|trigger))\b"
)
_CLAIMS = words("claim assert suggest imply conclude argue insist recommend")
# Other diagnoses, causes and options belong in some answers and are clutter in others.
_PERHAPS_OWED = re.compile(
    r"(?:(?:any|the|an?|at\s+least\s+one)\s+)*(?:other|alternative|additional|further|differential)\b"
    rf"(?!.*\b{_IRRELEVANT}\b)"
)
# Follows the object: the effect of leaving it out, or a judgement of the object.
_FAULTS_FOLLOW = re.compile(
    r"\b(?:or|and)\s+(?:lacks?|fails?|omits?|neglects?|overlooks?)\b"
    r"|\b(?:leading\s+to|resulting\s+in|causing|risking)\s+(?:\w+\s+){0,2}(?:confus|misunder|misinterp|ambigu|incomplete"
    r"|uncertain|harm|delay)"
    r"|,\s*which\s+(?:is|are)\s+(?:\w+\s+)?(?:crucial|critical|essential|important|necessary|key|vital|required|relevant)\b"
)
_DESPITE = re.compile(r"\bdespite\b")
_SAID_WRONG_AFTER = re.compile(
    r",\s*(?:which|that)\s+(?:is|are|would\s+be)\s+(?:\w+\s+)?(?:incorrect|wrong|false|inaccurate|inappropriate|misleading"
    r"|irrelevant|unrelated|unnecessary)\b"
    r"|,\s*(?:thereby\s+|thus\s+)?avoiding\b"
    r"|\b(?:that|which)\s+(?:are|is|do|does)\s+(?:not\s+(?:pertain|relate|relevant|related|pertinent|applicable|indicative"
    r"|supported|associated)|unlikely|irrelevant|unrelated)\b"
)
# "Does not suggest X without clear differentiation", "... unless relevant": X is good only under a condition.
_CONDITION = re.compile(
    r"\bunless\b|\bexcept\s+(?:when|if|where)\b"
    r"|\bwithout\s+(?:(?:clear|proper|adequate|sufficient|appropriate|any|further|specific|diagnostic|prior)\s+)?(?:evidence|justification"
    r"|indication|reason|differentiat\w+|distinguish\w+|clarif\w+|explain\w*|explanation|context|considering|consideration"
    r"|confirm\w+|assess\w+|evaluat\w+|testing|histology|stating|noting)\b"
)
_SPEAKS_AGAINST = r"(?:recommend|suggest|advis|advocat|propos|encourag|prescrib|indicat|stat)(?:e|es|s|ed|ing)\s+"
_SAID_AGAINST = re.compile(
    rf"{_SPEAKS_AGAINST}(?:against|avoid\w*|not\s+to|not\s+\w+ing|refrain\w*(?:\s+from)?|that\s+.{{0,60}}\bnot\b)"
)
_TELLING = re.compile(
    r"\s*(?:the\s+)?(?:discuss|mention|includ|explor|focus|elaborat|address|speculat|consider|list|suggest|diagnos)\w*\b"
)
_PRESCRIBES = words(verbs("recommend suggest advise prescribe propose advocate encourage endorse promote administer"))
_AVOIDANCE = words(verbs("avoid refrain abstain"), "avoidance")
# "Recommends checking that all values are positive": care, which is rarely a pitfall.
_CHECKS = re.compile(
    r"\w+\s+(?:checking|verifying|confirming|ensuring|clarifying|considering|distinguishing|acknowledging|ruling\s+out"
    r"|re-?checking|double-checking)\b"
)
_AND_AVOIDS = re.compile(r"\b(?:and|while|but)\s+(?:avoid|refrain|abstain)\w*\b")
_CAREFUL = re.compile(
    r"^\w+\s+(?:only|just)\b|\b(?:cautious\w*|careful\w*|conservative\w*|caution|appropriate\w*|accurate\w*|only\s+when|only\s+if|as\s+needed)\b"
)
_TELLS = (
    r"mention\w*|discuss\w*|address\w*|explain\w*|acknowledg\w*|recommend\w*|suggest\w*|provid\w*|includ\w*|identif\w*"
)
_AVOIDS_TELLING = re.compile(rf"(?:avoid|refrain|abstain)(?:s|ed|ing)?\s+(?:from\s+)?(?:{_TELLS})\s+(?P<object>.+)")
# An adjective before its noun. "... that statement (B) is false" does not argue against the statement.
_WRONG_OBJECT = re.compile(
    r"(?<!\bis )(?<!\bare )(?<!\bbe )(?<!\bas )(?<!\bwas )"
    rf"\b(?P<wrong>{_IRRELEVANT}|incorrect|wrong|misleading|inaccurate|unsupported|false(?!\s+(?:positive|negative))|erroneous"
    r"|inappropriate|unsafe|harmful|outdated|unproven|dangerous|speculative|contradictory|unlikely|distract\w*|mistaken\w*"
    r"|unfounded)\b"
)
# Signs that an act is bad, independent of the title.
_BADLY = re.compile(
    rf"\b(?:instead\s+of|rather\s+than|despite|incorrectly|wrongly|mistakenly|prematurely|unnecessarily|{_IRRELEVANT}"
    r"|without\s+(?!(?:\w+\s+)?(?:unnecessary|extraneous|irrelevant|excess\w*|overly|adding|digress\w*|jargon|detail)))\b"
)

_TOKEN = re.compile(r"\([a-h]\)|[a-z0-9]+(?:[-'][a-z0-9]+)*")
_COMMON_WORDS = """
    a about above after all also an and any are as at be because been before being between both but by can could
    did do does during each either for from further had has have having if in instead into is it its may might
    more most must no nor not of off on once only or other our out over own rather same shall should so some such
    than that the their them then there these they this those through to too under until up very was were when
    where which while who whom why will with would answer response explanation question patient patients case
    given mention mentions mentioning state states stating identify identifies identifying recommend recommends
    recommending suggest suggests suggesting include includes including explain explains explaining discuss
    discusses discussing describe describes provide provides providing specify specifies indicate indicates use
    uses using used correct final option treatment treatments diagnosis condition conditions appropriate possible
    potential likely key part need needs role importance important consider considers considering despite
    consideration considerations
"""
_COMMON = frozenset(_COMMON_WORDS.split())
# Where the head of an object ends: "renal vein thrombosis" of "renal vein thrombosis as a cause of ...".
_HEAD_ENDS = re.compile(
    r"\b(?:as|for|in|to|of|with|when|during|by|on|from|before|after|that|which|at|over|than|instead|rather|using|via|through"
    r"|such|including|like|if|because|due|leading|without|against|among|between|into|or|and|is|are|can|may|should)\b|[,;(]"
)
_OTHER_THAN = re.compile(r"\b(?:other\s+than|except\s+for|besides)\b")
_GERUND = re.compile(r"(?:(?:the|any)\s+)?\w+ing\b\s*")
_AGAINST = re.compile(
    r"\b(?:not|no|never|without|avoid\w*|(?:recommend|advis|caution|warn|argu|speak)\w*\s+against|contraindicat\w*|inappropriate|incorrect\w*|unnecessary|unlikely"
    r"|rather\s+than|instead\s+of|rul(?:e|es|ed|ing)\s+out|exclud\w*|inconsistent|less\s+likely|unrelated|ineffective"
    r"|wrong\w*|eliminat\w*|harmful|differs?|distinguish\w*|differentiat\w*|unlike|no\s+longer|cannot|\w+n't)\b"
)
_ENDS = re.compile(
    r"\b(?:stop(?:s|ped|ping)?|discontinu(?:e|es|ed|ing)|withhold(?:s|ing)?|withheld|withdraw(?:s|ing|n)?|ceas(?:e|es|ed|ing))"
    r"\s+(?:(?:the|all|any|his|her|their)\s+)?(?P<object>\S+(?:\s+\S+)?)"
)
_HARMS = re.compile(
    r"\b(?:caus(?:e|es|ed|ing)|trigger\w*|induced|culprit|offending|toxic\w*|adverse|worsen\w*|interact\w*"
    r"|(?:increas|rais|carr|pos)\w*\s+(?:the\s+|a\s+)?(?:\w+\s+)?risks?)\b"
)
_OPTIONS = re.compile(r"\(([a-h])\)")
_RIGHT_OPTION = re.compile(r"\(([a-h])\)|\b(?:answer|option|choice)\s+is:?\s+([a-h])[.)]")
ASKED_SHARE = 0.6
"""Share of a pitfall's content words that a sentence of the row must contain to be about the same thing."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the rest of a row asks for.

    Args:
        wanted: The texts of its positive criteria, without labels, and the sentences of its reference answer.
    """

    wanted: tuple[str, ...] = ()

    @classmethod
    def of(cls, criteria: Iterable[str], reference: str | None) -> Row:
        """Build it from the texts of the positive criteria and the reference answer."""
        sentences = re.split(r"(?<=[.!?;])\s+|\n+", reference or "")
        return cls(tuple(text for text in (*criteria, *sentences) if text.strip()))


def decide(text: str, title: str | None, row: Row) -> Decision:
    """Decide the polarity of a pitfall from its wording, its title and the rest of its row.

    Args:
        text: The description without its label.
        title: The title, if there is one.
        row: What the rest of the row asks for.
    """
    rest = without_subject(plain(text))
    wording, names = read(text), _title(title)
    if MODAL.match(rest):
        return wording or "silent"
    if never := _NEVER.match(rest):
        return _never(rest[never.end() :], wording, names, row)
    if telling := _AVOIDS_TELLING.match(rest):
        return _avoids_telling(telling["object"], names, row)
    if avoidance := _AVOIDANCE.match(rest):
        # "Avoids ignoring X" stays a virtue under the title "Neglect of X".
        is_evasive = names in ("omission", "wrong act") and not BAD.match(rest[avoidance.end() :].lstrip())
        return "disagree" if is_evasive else "avoid"
    if against := _SAID_AGAINST.match(rest):
        return _said_against(rest[against.end() :], plain(title or ""), row)
    unsaid = _UNSAID.match(rest)
    if unsaid and not _is_double_negative(rest):
        return _unsaid(unsaid, wording, title, row)
    if wording == "commit" and ACT.match(rest) and not BAD.match(rest):
        return _act(rest, names, row)
    return wording or "silent"


def _title(title: str | None) -> Naming | None:
    """What a title names; None for a topic, or without a title."""
    text = _TITLE_LABEL.sub("", plain(title or ""), count=1)
    if negated := _TITLE_NEGATED.match(text):
        act = text[negated.end() :]
        if BAD.match(act) or WRONGLY.match(act):
            return "good"
        return "omission" if _TITLE_DUTY.match(act) else None
    if _TITLE_NO_OMISSION.match(text):
        return "no omission"
    if _TITLE_GOOD.match(text):
        return "good"
    if _TITLE_OMISSION.match(text):
        return "omission"
    return "wrong act" if _TITLE_WRONG_ACT.match(text) else None


def _is_double_negative(rest: str) -> bool:
    negative = _DOUBLE_NEGATIVE.match(rest)
    return negative is not None and bool(WRONGLY.match(rest, negative.end()) or BAD.match(rest, negative.end()))


def _unsaid(unsaid: re.Match[str], wording: Reading | None, title: str | None, row: Row) -> Decision:
    """Decide "does not VERB X": good if X is wrong, bad if X belongs in the answer."""
    verb, second, what = unsaid["verb"], unsaid["second"], unsaid["object"]
    act, names = f"{verb} {what}", _title(title)
    wrong = _WRONG_OBJECT.search(what[:80])
    # "Does not mention or confuse with ...": the second verb is a fault, so leaving both out is good. "Does not mention
    # or ignores ...", "... or poorly explains ...": it is not under the "not", and stays a fault.
    is_apart = second is not None and re.search(r"(?:[^s]s|ly)$", second) is not None
    leaves_fault_out = second is not None and not is_apart and BAD.match(second) is not None
    is_wrong = bool(FAULTY_OBJECT.match(act) or wrong or _SAID_WRONG_AFTER.search(what) or leaves_fault_out)
    if AVOID.match(act):
        return "disagree" if names == "good" else "commit"
    if _ALWAYS_OWED.match(act):
        if (names == "good" and is_wrong) or re.match(rf"\w+\s+(?:\w+\s+)?{_IRRELEVANT}\b", act):
            return "disagree"
        return "commit"
    # A row that calls a drug the cause of harm mentions it without asking for it.
    skip = _HARMS if _PRESCRIBES.match(act) else None
    must = wrong["wrong"] if wrong else None
    stance = _options(what, row) or _stance(what, row, skip=skip, must=must, topic=None if names else title)
    condition = _CONDITION.search(what)
    good = [
        names == "good",
        is_wrong,
        stance == "rejected" and names != "omission",
        condition is not None,
        _OTHER_THAN.search(what) is not None,
    ]
    bad = [
        names in ("omission", "wrong act", "no omission"),
        stance == "asked",
        bool(_OWED_OBJECT.match(what) or (_OWED_WARNING.match(what) and not _CLAIMS.match(verb))),
        is_apart,
        bool(_FAULTS_FOLLOW.search(what) or (_DESPITE.search(what) and not _PRESCRIBES.match(act))),
    ]
    if (any(good) and any(bad)) or (names == "good" and _PERHAPS_OWED.match(what)):
        return "disagree"
    if any(good):
        bears_on_it = names == "good" and _bears_on(plain(title or ""), what)
        is_clear = bears_on_it or is_wrong or _options(what, row) == "rejected"
        # "Does not recommend X without confirmation" and "does not mention X unless ..." describe a careful answer.
        is_clear = is_clear or (condition and (_PRESCRIBES.match(act) or condition.group().startswith("unless")))
        return "avoid" if is_clear else "silent"
    if any(bad):
        return "commit"
    # The verb is not about telling, as in "does not round intermediate values".
    return "avoid" if wording == "avoid" else "silent"


def _bears_on(title: str, what: str) -> bool:
    """Whether a title "Avoids ..." is about the content of an answer, and therefore means leaving out `what`."""
    if _TITLE_DELAY.search(title):
        return _WAITS.search(what) is not None
    return _TITLE_CONTENT.search(title) is not None or bool(_tokens(title) & _tokens(what))


def _never(what: str, wording: Reading | None, names: Naming | None, row: Row) -> Decision:
    """Decide "never VERBs X": an instruction, unless X belongs in the answer."""
    is_owed = names in ("omission", "wrong act") or _OWED_OBJECT.match(what) or _stance(what, row) == "asked"
    return "disagree" if is_owed else wording or "silent"


def _said_against(rest: str, title: str, row: Row) -> Decision:
    """Decide "recommends against X" and "suggests avoiding X": good if X is wrong, bad if the row asks for it.

    A title "Avoids ..." may mean the advice or what it is about, so it counts only where X is something to be told
    ("discussing other disorders"), or where it names X itself.
    """
    names = _title(title)
    is_named = bool(_tokens(rest) & _tokens(title))
    condition = _CONDITION.search(rest[:120])
    # In "against prescribing X without evidence" the act lacks it; in "against X without evidence" the advice may.
    is_of_advice = condition is not None and not _GERUND.match(rest.lstrip()) and not _TELLING.match(rest)
    good = bool(_WRONG_OBJECT.search(rest[:120]) or (condition and not is_of_advice))
    good = good or (names == "good" and (is_named or _TELLING.match(rest) is not None))
    bad = names in ("omission", "wrong act") or is_of_advice or _stance(rest, row) == "asked"
    if good and bad:
        return "disagree"
    return "avoid" if good else "commit" if bad else "silent"


def _avoids_telling(what: str, names: Naming | None, row: Row) -> Decision:
    """Decide "avoids mentioning X", which is evasive if the row asks for X."""
    bad = names in ("omission", "wrong act") or (_stance(what, row) == "asked" and not _WRONG_OBJECT.search(what[:80]))
    return "disagree" if bad else "avoid"


def _act(rest: str, names: Naming | None, row: Row) -> Decision:
    """Decide "recommends X", which is bad under any title, and "states X", which a virtue in the title contradicts."""
    if _PRESCRIBES.match(rest):
        is_asked = _stance(rest, row, share=0.95) == "asked"
        if _AND_AVOIDS.search(rest):
            return "avoid" if names == "good" else "disagree"
        if _BADLY.search(rest):
            return "disagree" if is_asked else "commit"
        if _CHECKS.match(rest) and names != "wrong act":
            return "silent"
        is_virtue = names in ("good", "no omission") and _CAREFUL.search(rest)
        return "disagree" if is_asked or is_virtue else "commit"
    is_asked = _stance(rest, row, share=0.8) == "asked"
    is_virtue = names in ("good", "no omission") and not _BADLY.search(rest)
    return "disagree" if is_virtue or is_asked else "commit"


def _tokens(text: str) -> set[str]:
    return {_stem(token) for token in _TOKEN.findall(plain(text)) if token not in _COMMON and len(token) > 1}


def _stem(token: str) -> str:
    """A crude stem, which matches "diuretic" with "diuretics", and "replacing" with "replacement"."""
    if len(token) <= 5:
        return token.removesuffix("s")
    return re.sub(r"(?:ations?|ated|ating|ements?|ings?|ies|ed|es|s|ly|al|ic|y|e)$", "", token)


def _head(what: str) -> set[str]:
    """The content words of the head of an object: "pelvic ultrasound" in "a pelvic ultrasound as the first test"."""
    for part in _HEAD_ENDS.split(what):
        # "starting steroids" is about steroids; "monitoring of liver enzymes" has nothing else before "of".
        tokens = _tokens(_GERUND.sub("", part, count=1)) or _tokens(part)
        if tokens:
            return tokens
    return set()


def _options(what: str, row: Row) -> Literal["asked", "rejected"] | None:
    """Whether the row's correct options are those that a pitfall names as the answer."""
    named = set(_OPTIONS.findall(what))
    if not named or not re.search(r"\b(?:answer|choice|option|correct)\b", what) or _AGAINST.search(what):
        return None
    right = {
        letter
        for sentence in map(plain, row.wanted)
        if not _AGAINST.search(sentence) and re.search(r"\b(?:answer|choice|option|correct)\b", sentence)
        for found in _RIGHT_OPTION.finditer(sentence)
        for letter in found.groups()
        if letter
    }
    if not right:
        return None
    return "asked" if named <= right else "rejected" if not named & right else None


def _stance(
    what: str,
    row: Row,
    share: float = ASKED_SHARE,
    skip: re.Pattern[str] | None = None,
    must: str | None = None,
    topic: str | None = None,
) -> Literal["asked", "rejected"] | None:
    """Whether the row asks for something or rejects it; None for neither or both.

    Args:
        what: The thing, in the words of the pitfall.
        row: What the rest of the row asks for.
        share: Share of its content words that a sentence must contain to be about it.
        skip: Sentences that match this are ignored.
        must: A part of `what` that a sentence must contain to be about it.
        topic: A title that only names a topic. A sentence that contains all of it is about that topic.
    """
    named, head = _tokens(what), _head(what)
    if not named or _OTHER_THAN.search(what):
        return None
    topics = _tokens(topic or "")
    # "that the field vanishes at the surface": the verb may be another one.
    needed = len(head) if len(head) < (2 if what.startswith("that ") else 4) else len(head) - 1
    is_negative = _is_against(what, named)
    found: set[bool] = set()
    for sentence in map(plain, row.wanted):
        tokens = _tokens(sentence)
        shared = named & tokens
        is_about_it = len(shared) >= min(2, len(named)) and len(shared) >= share * len(named)
        if (
            not is_about_it
            or (must and must not in sentence)
            or (skip and skip.search(sentence) and not skip.search(what))
        ):
            continue
        is_like_it = _is_against(sentence, named) == is_negative
        # "Names oral fidaxomicin for C. difficile" does not ask for oral vancomycin.
        if not is_like_it or len(head & tokens) >= needed or (len(topics) > 1 and topics <= tokens):
            found.add(is_like_it)
    return None if len(found) != 1 else "asked" if found.pop() else "rejected"


def _is_against(sentence: str, named: set[str]) -> bool:
    """Whether a sentence argues against something, or stops it ("stops warfarin", but not "stops bleeding with it")."""
    return bool(_AGAINST.search(sentence)) or any(_tokens(ends["object"]) & named for ends in _ENDS.finditer(sentence))
