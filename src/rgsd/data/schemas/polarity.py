"""Deciding which way round a pitfall is worded: is meeting it good, or bad?

RaR's pitfalls all carry a negative weight, and are worded both ways. "The response should avoid X" is met by a good
response (most of RaR-Science); "Recommends X" and "Omits Y" are met by a bad one (most of RaR-Medicine). "Does not
mention X" is either: a fault when X belongs in the answer, a virtue when X is wrong.

Three sources say something: the description's wording (`read`), the title ("Avoids ..." against "Omits ..."), and the
rest of the row, which asks for X, rejects X, or does not speak of it. `decide` combines them. Where they disagree, or
none of them says, there is no decision: an inverted pitfall teaches the opposite of what its author meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
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


# --- The title and the rest of the row ------------------------------------------------------------------------------

Decision = Literal["avoid", "commit", "disagree", "silent"]
"""How to take a pitfall. disagree: its sources contradict each other. silent: none of them says."""

_TITLE_GOOD = re.compile(
    r"(?:avoid(?:s|ing|ance)?|prevent(?:s|ing)?|refrains?|excludes?|rejects?)\b"
    r"|(?:no|without|free of)\s+(?:\w+\s+)?(?:irrelevan|unnecessar|incorrect|wrong|inaccura|mislead|extraneous"
    r"|unrelated|inappropriat|false|mis|over|unsupported|confus|error|speculat|contradict|harmful|unsafe|invasive|alternative"
    r"|exaggerat|premature|excessive|redundan|jargon|assum|other\b)"
    r"|(?:does|do|must|should)\s+not\s+(?!(?:mention|include|address|explain|discuss|identify|consider)\b)"
)
_TITLE_OMISSION = re.compile(
    r"omi(?:ts?|tted|tting|ssion)|miss(?:es|ing|ed)\b|lack(?:s|ing)?\b|fail|neglect|ignor|overlook|forget|skips?\b"
    r"|disregard|absen(?:t|ce)|incomplete|insufficient|inadequate|unaddressed|undermention|underestimat|unmentioned"
    r"|(?:does|do)\s+not\s+(?:mention|include|address|explain|discuss|identify|consider)\b"
)
_TITLE_WRONG_ACT = re.compile(
    r"mis(?:identif|interpret|diagnos|attribut|stat|represent|classif|label|tak|us|understand|manag|calculat|appl)\w*"
    r"(?:ies|es|s)\b|(?:confuses|conflates|contradicts|dismisses|downplays|overstates|understates|minimi[sz]es)\b"
)

_DOUBLE_NEGATIVE = re.compile(r"(?:do|does|did)\s*(?:not|n't)\s+|(?:never)\s+")
_UNSAID = re.compile(
    r"(?:(?:do|does|did)\s*(?:not|n't)|not|cannot|no)\s+(?:(?:explicitly|clearly|ever|specifically|also|even)\s+)*"
    r"(?P<verb>\w+)\s+(?P<object>.+)"
)
# Left undone, these are a fault whatever they are said of: nobody is to leave a wrong thing unexplained.
_ALWAYS_OWED = _words(
    "explain distinguish differentiate clarify justify warn caution verify derive check define demonstrate ensure",
    "correctly accurately adequately sufficiently fully properly acknowledge recogni[sz]e",
)
_OWED_OBJECT = re.compile(
    r"(?:that\s+)?(?:(?:any|the|a|an|potential|possible|associated|patient|patients'|at\s+least\s+one)\s+)*"
    r"(?:importance|need|necessity|urgency|risks?|complications?|contraindications?|side\s+effects?|adverse\s+effects?"
    r"|limitations?|significance|reasons?|rationale|why|how|key|critical|crucial|essential|necessary|safety|monitoring"
    r"|follow[- ]up|informed\s+consent)\b"
)
_SAID_AGAINST = re.compile(
    r"(?:recommend|suggest|advis|advocat|propos|encourag|prescrib|indicat|stat)(?:e|es|s|ed|ing)\s+"
    r"(?:against|avoid\w*|not\s+to|not\s+\w+ing|stopping|withholding|delay\w*|refrain\w*|that\s+.{0,60}\bnot\b)"
)
_PRESCRIBES = _words(_verbs("recommend suggest advise prescribe propose advocate encourage endorse promote administer"))
_AVOIDANCE = _words(_verbs("avoid refrain abstain"), "avoidance no_mention_of")
_TELLS = (
    r"mention\w*|discuss\w*|address\w*|explain\w*|acknowledg\w*|recommend\w*|suggest\w*|provid\w*|includ\w*|identif\w*"
)
_AVOIDS_TELLING = re.compile(rf"(?:avoid|refrain|abstain)(?:s|ed|ing)?\s+(?:from\s+)?(?:{_TELLS})\s+(?P<object>.+)")
_WRONG_OBJECT = re.compile(
    r"\b(?:irrelevant|unnecessary|extraneous|incorrect|wrong|unrelated|misleading|inaccurate|unsupported|false|erroneous"
    r"|superfluous|redundant|inappropriate|unsafe|harmful|outdated|unproven|dangerous|speculative|contradictory"
    r"|distract\w*|mistaken\w*|unfounded|excessive|without\s+(?:proper\s+)?(?:evidence|justification|indication))\b"
)

_TOKEN = re.compile(r"\([a-h]\)|[a-z0-9]+(?:[-'][a-z0-9]+)*")
_COMMON = frozenset(
    [
        "a",
        "about",
        "above",
        "after",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "during",
        "each",
        "either",
        "for",
        "from",
        "further",
        "had",
        "has",
        "have",
        "having",
        "if",
        "in",
        "instead",
        "into",
        "is",
        "it",
        "its",
        "may",
        "might",
        "more",
        "most",
        "must",
        "no",
        "nor",
        "not",
        "of",
        "off",
        "on",
        "once",
        "only",
        "or",
        "other",
        "our",
        "out",
        "over",
        "own",
        "rather",
        "same",
        "shall",
        "should",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "very",
        "was",
        "were",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "why",
        "will",
        "with",
        "would",
        "answer",
        "response",
        "explanation",
        "question",
        "patient",
        "patients",
        "case",
        "given",
        "mention",
        "mentions",
        "mentioning",
        "state",
        "states",
        "stating",
        "identify",
        "identifies",
        "identifying",
        "recommend",
        "recommends",
        "recommending",
        "suggest",
        "suggests",
        "suggesting",
        "include",
        "includes",
        "including",
        "explain",
        "explains",
        "explaining",
        "discuss",
        "discusses",
        "discussing",
        "describe",
        "describes",
        "provide",
        "provides",
        "providing",
        "specify",
        "specifies",
        "indicate",
        "indicates",
        "use",
        "uses",
        "using",
        "used",
        "correct",
        "final",
        "option",
        "treatment",
        "treatments",
        "diagnosis",
        "condition",
        "conditions",
        "appropriate",
        "possible",
        "potential",
        "likely",
        "key",
        "part",
        "need",
        "needs",
        "role",
        "importance",
        "important",
        "consider",
        "considers",
        "considering",
    ]
)
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
ASKED_SHARE = 0.6
"""Share of a pitfall's content tokens that one sentence of the row must hold to be about the same thing."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the rest of a row wants.

    Args:
        wanted: the row's positive criteria, without labels, and the sentences of its reference answer.
    """

    wanted: tuple[str, ...] = ()

    @classmethod
    def of(cls, criteria: Iterable[str], reference: str | None) -> Row:
        """From the positive criteria's texts and the reference answer."""
        sentences = re.split(r"(?<=[.!?;])\s+|\n+", reference or "")
        return cls(tuple(text for text in (*criteria, *sentences) if text.strip()))


def decide(text: str, title: str | None, row: Row) -> Decision:
    """How to take a pitfall, from its wording, its title and the rest of its row.

    Args:
        text: the description without its label.
        title: its title, if any.
        row: what the rest of the row wants.
    """
    plain = _plain(text)
    rest = _without_subject(plain)
    wording, names = read(text), _title(title)
    if _MODAL.match(rest):
        return wording or "silent"
    if telling := _AVOIDS_TELLING.match(rest):
        return _avoids_telling(telling["object"], names, row)
    if _AVOIDANCE.match(rest):
        return "disagree" if names == "omission" else "avoid"
    if _SAID_AGAINST.match(rest):
        return _said_against(rest, names, row)
    unsaid = _UNSAID.match(rest)
    if unsaid and not _is_double_negative(rest):
        return _unsaid(unsaid, wording, names, row)
    if wording == "commit" and _ACT.match(rest) and not _BAD.match(rest):
        return _act(rest, names, row)
    return wording or "silent"


def _plain(text: str) -> str:
    return " ".join(text.translate(PLAIN).lower().split()).lstrip("-*• ")


def _without_subject(plain: str) -> str:
    subject = _SUBJECT.match(plain)
    rest = plain[subject.end() :] if subject else plain
    adverbs = _ADVERBS.match(rest)
    return rest[adverbs.end() :] if adverbs else rest


def _title(title: str | None) -> Literal["good", "omission", "wrong act"] | None:
    """What a title names: a virtue ("Avoids ..."), something left out ("Omits ..."), a wrong act, or only a topic."""
    plain = _plain(title or "")
    if _TITLE_GOOD.match(plain):
        return "good"
    if _TITLE_OMISSION.match(plain):
        return "omission"
    return "wrong act" if _TITLE_WRONG_ACT.match(plain) else None


def _is_double_negative(rest: str) -> bool:
    negative = _DOUBLE_NEGATIVE.match(rest)
    return negative is not None and bool(_WRONGLY.match(rest, negative.end()) or _BAD.match(rest, negative.end()))


def _unsaid(unsaid: re.Match[str], wording: Reading | None, names: str | None, row: Row) -> Decision:
    """ "Does not VERB X": a virtue when X is wrong, a fault when X belongs in the answer."""
    act, what = f"{unsaid['verb']} {unsaid['object']}", unsaid["object"]
    is_wrong = bool(_FAULTY_OBJECT.match(act)) or bool(_WRONG_OBJECT.search(what[:80]))
    if _ALWAYS_OWED.match(act):
        return "disagree" if names == "good" and is_wrong else "commit"
    # A drug that the row calls the cause of harm is not one that it asks to be recommended.
    stance = _stance(what, row, skip=_HARMS if _PRESCRIBES.match(act) else None)
    good = [names == "good", is_wrong, stance == "rejected"]
    bad = [names in ("omission", "wrong act"), stance == "asked", bool(_OWED_OBJECT.match(what))]
    if any(good) and any(bad):
        return "disagree"
    if any(good):
        return "avoid" if names == "good" or is_wrong else "silent"
    if any(bad):
        return "commit"
    # An act that is no act of telling: "does not round intermediate values".
    return "avoid" if wording == "avoid" else "silent"


def _said_against(rest: str, names: str | None, row: Row) -> Decision:
    """ "Recommends against X", "Suggests avoiding X"."""
    stance = _stance(_SAID_AGAINST.sub("", rest, count=1), row)
    good = names == "good" or bool(_WRONG_OBJECT.search(rest[:120]))
    bad = names in ("omission", "wrong act") or stance == "asked"
    if good and bad:
        return "disagree"
    return "avoid" if good else "commit" if bad else "silent"


def _avoids_telling(what: str, names: str | None, row: Row) -> Decision:
    """ "Avoids mentioning X": evasive when the row asks for X."""
    bad = names == "omission" or (_stance(what, row) == "asked" and not _WRONG_OBJECT.search(what[:80]))
    return "disagree" if bad else "avoid"


def _act(rest: str, names: str | None, row: Row) -> Decision:
    """ "Recommends X" is a bad act under any title; "States X" under none that says the opposite."""
    if _PRESCRIBES.match(rest):
        return "disagree" if _stance(rest, row, share=0.95) == "asked" else "commit"
    is_asked = _stance(rest, row, share=0.8) == "asked"
    return "disagree" if names == "good" or is_asked else "commit"


def _tokens(text: str) -> set[str]:
    return {_stem(token) for token in _TOKEN.findall(_plain(text)) if token not in _COMMON and len(token) > 1}


def _stem(token: str) -> str:
    """A crude stem, enough to match "diuretic" and "diuretics", "replacing" and "replacement"."""
    if len(token) <= 5:
        return token.removesuffix("s")
    return re.sub(r"(?:ations?|ated|ating|ements?|ings?|ies|ed|es|s|ly|al|ic|y|e)$", "", token)


def _stance(
    what: str, row: Row, share: float = ASKED_SHARE, skip: re.Pattern[str] | None = None
) -> Literal["asked", "rejected"] | None:
    """Whether the row asks for something, rejects it, or says neither (or both). Sentences with `skip` say neither."""
    named = _tokens(what)
    if not named:
        return None
    is_negative = _is_against(what, named)
    found: set[bool] = set()
    for sentence in map(_plain, row.wanted):
        shared = named & _tokens(sentence)
        is_about_it = len(shared) >= min(2, len(named)) and len(shared) >= share * len(named)
        if is_about_it and not (skip and skip.search(sentence) and not skip.search(what)):
            found.add(_is_against(sentence, named) == is_negative)
    return None if len(found) != 1 else "asked" if found.pop() else "rejected"


def _is_against(sentence: str, named: set[str]) -> bool:
    """Whether a sentence speaks against what is named, or ends it ("stops warfarin", yet not "stops bleeding with")."""
    return bool(_AGAINST.search(sentence)) or any(_tokens(ends["object"]) & named for ends in _ENDS.finditer(sentence))
