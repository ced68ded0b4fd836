"""Claims about RGSD, and whether the lab's results reproduce them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rgsd.evaluation.conclusions import Conclusion, conclude
from rgsd.lab.benches import Bench, NanoBench
from rgsd.lab.measurements import LabResults, SeedInterval


@dataclass(frozen=True)
class Claim:
    """A claim of the RGSD paper or of a related source.

    Args:
        text: What is claimed.
        arm, other: The arms whose difference (arm minus other) decides it.
        measure: A measure of the bench.
        kind: "more" (arm above other), "less", "no less" (not below by more than `margin`), or "same" (within it).
        margin: In the unit of the measure.
        source: Who claims it: an arXiv number, a method, or this lab.
    """

    text: str
    arm: str
    other: str
    measure: str = "satisfaction"
    kind: str = "more"
    margin: float = 0.05
    source: str = "2606.12507"


_THEN, _HINTS = "2608.31119", "2606.11709"
_CONTRAST = tuple(
    Claim(f"A contrastive teacher (gamma {gamma:g}) beats the plain one.", f"contrast-{gamma:g}", "rgsd", source=_HINTS)
    for gamma in (0.5, 1, 2)
)
CLAIMS: tuple[Claim, ...] = (
    Claim("The base model scores higher when it sees the rubric (the conditioning gap).", "base+rubric", "base"),
    Claim("RGSD raises satisfaction on held-out prompts.", "rgsd", "base"),
    Claim("The right rubric teaches more than a mismatched one.", "rgsd", "mismatched", source="2606.19327"),
    Claim("A teacher without privileged context teaches nothing.", "none", "base", kind="same", source="control"),
    Claim("RGSD is on a par with judge-GRPO on equal prompts.", "rgsd", "grpo", kind="no less"),
    Claim("RGSD beats judge-GRPO in about equal time.", "rgsd", "grpo-equal-seconds", source="this lab"),
    Claim("GRPO's responses are longer than RGSD's.", "grpo", "rgsd", "tokens"),
    Claim("GRPO's responses contain more false claims than RGSD's.", "grpo", "rgsd", "false_share"),
    Claim("RGSD's responses are more to the point than GRPO's.", "rgsd", "grpo", "to_the_point", source="this lab"),
    Claim("On-policy distillation beats fine-tuning on the teacher's responses.", "rgsd", "sft", source="2601.18734"),
    Claim("The paper's clip of 0.05 per entry does no harm.", "entry-0.05", "rgsd", kind="no less"),
    Claim("The same cap per token learns less.", "token-0.05", "entry-0.05", kind="less", source="this lab"),
    Claim("Forward KL beats Jensen-Shannon.", "beta-0", "rgsd", source="2601.18734"),
    Claim("Reverse KL beats Jensen-Shannon.", "beta-1", "rgsd", source="this lab"),
    Claim("The raw rubric beats a self-written reference.", "rgsd", "reference"),
    Claim("Adding a reference to the rubric gains nothing.", "both", "rgsd", kind="same", source="this lab"),
    Claim("A frozen teacher is as good as a moving average.", "rgsd", "ema", kind="no less", source="SDFT"),
    Claim("A live teacher is no better than a frozen one.", "rgsd", "live", kind="no less", source="this lab"),
    Claim("LoRA learns as much as full training.", "lora", "rgsd", kind="no less", source="this lab"),
    Claim("Without the think-mask, reasoning learns to name the rubric.", "think-unmasked", "think", "names_rubric"),
    Claim("The think-mask costs no satisfaction.", "think", "think-unmasked", kind="no less"),
    Claim("RGSD gains less where rubrics do not generalize.", "generality-0", "rgsd", kind="less", source="this lab"),
    Claim("GRPO learns more from a stronger judge.", "judge-exact", "judge-wrong-0.3"),
    Claim("With the strongest judge, GRPO beats RGSD on equal prompts.", "grpo", "rgsd"),
    Claim("A lenient judge is hacked: responses state more facts.", "judge-lenient", "judge-exact", "stated"),
    Claim("A judge that favors long responses trains a worse policy.", "judge-lenient", "judge-exact", kind="less"),
    Claim("A judge that favors long responses makes responses longer.", "judge-lenient", "judge-exact", "tokens"),
    *_CONTRAST,
    Claim("RGSD followed by GRPO beats RGSD alone.", "rgsd-then-grpo", "rgsd", source=_THEN),
    Claim("RGSD followed by GRPO beats GRPO alone in equal time.", "rgsd-then-grpo", "grpo-19", source=_THEN),
    Claim("RGSD before GRPO beats RGSD after GRPO.", "rgsd-then-grpo", "grpo-then-rgsd", source=_THEN),
    Claim("RGSD alone gets worse from 200 steps to 400.", "rgsd-400", "rgsd-200", kind="less", source=_THEN),
)
"""In the nano world."""

BUNDLED_CLAIMS: tuple[Claim, ...] = (
    Claim("The base model scores higher when it sees the rubric (the conditioning gap).", "base+rubric", "base"),
    Claim("RGSD raises satisfaction on held-out prompts.", "rgsd", "base"),
    Claim("The right rubric teaches more than a mismatched one.", "rgsd", "mismatched", source="2606.19327"),
    Claim("It teaches more content, too.", "rgsd", "mismatched", "content", source="this lab"),
    Claim("RGSD falls into fewer pitfalls than the mismatched control.", "rgsd", "mismatched", "pitfalls", "less"),
    Claim("A teacher without privileged context teaches nothing.", "none", "base", kind="same", source="control"),
    Claim("RGSD is on a par with judge-GRPO on equal prompts.", "rgsd", "grpo", kind="no less"),
    Claim("RGSD beats judge-GRPO in about equal time.", "rgsd", "grpo-equal-seconds", source="this lab"),
    Claim("GRPO's responses are longer than RGSD's.", "grpo", "rgsd", "tokens"),
    Claim("On-policy distillation beats fine-tuning on the teacher's responses.", "rgsd", "sft", source="2601.18734"),
    Claim("The paper's clip of 0.05 per entry does no harm.", "entry-0.05", "rgsd", kind="no less"),
    Claim("Forward KL beats Jensen-Shannon.", "rgsd", "beta-0.5", source="2601.18734"),
    Claim("Reverse KL beats Jensen-Shannon.", "beta-1", "beta-0.5", source="this lab"),
    Claim("The raw rubric beats a self-written reference.", "rgsd", "reference"),
    Claim("Adding a reference to the rubric gains nothing.", "both", "rgsd", kind="same", source="this lab"),
    Claim("A frozen teacher is as good as a moving average.", "rgsd", "ema", kind="no less", source="SDFT"),
    *_CONTRAST,
    Claim("RGSD followed by GRPO beats RGSD alone.", "rgsd-then-grpo", "rgsd", source=_THEN),
    Claim("RGSD followed by GRPO beats GRPO alone on equal prompts.", "rgsd-then-grpo", "grpo", source=_THEN),
    Claim("RGSD before GRPO beats RGSD after GRPO.", "rgsd-then-grpo", "grpo-then-rgsd", source=_THEN),
)
"""On a real model with the bundled prompts."""


def claims_of(bench: Bench) -> tuple[Claim, ...]:
    """The claims that a bench can decide."""
    return CLAIMS if isinstance(bench, NanoBench) else BUNDLED_CLAIMS


@dataclass(frozen=True)
class Finding:
    """A claim with the measured difference and the verdict."""

    claim: Claim
    difference: SeedInterval
    verdict: str


ONE_SEED = "one seed: no verdict"
"""An interval over prompts alone does not cover the randomness of training, so it decides nothing."""


def decide(claim: Claim, difference: SeedInterval) -> str:
    """Decide a claim by where the whole interval lies.

    Returns:
        "reproduced", "reversed", "not reproduced", "too few prompts to say", or "one seed: no verdict".
    """
    margin = {"more": 0.0, "less": 0.0, "no less": -claim.margin, "same": -claim.margin}
    if claim.kind not in margin:
        raise ValueError(f"unknown kind of claim {claim.kind!r}, known: {', '.join(margin)}")
    fields = {"mean": difference.mean, "low": difference.low, "high": difference.high, "n": difference.n_prompts}
    conclusion = conclude(fields, above=margin[claim.kind])
    if conclusion is Conclusion.TOO_FEW:
        return str(conclusion)
    if difference.n_seeds < 2:
        return ONE_SEED
    reproduced, reversed_ = Conclusion.BETTER, Conclusion.WORSE
    if claim.kind == "less":
        reproduced, reversed_ = reversed_, reproduced
    if claim.kind == "same" and conclusion is reproduced:
        # The interval lies above -margin. "Same" requires that it lies below +margin too.
        conclusion = conclude(fields, above=claim.margin)
        reproduced, reversed_ = reversed_, reproduced
    return {reproduced: "reproduced", reversed_: "reversed"}.get(conclusion, "not reproduced")


def findings(results: LabResults, claims: Sequence[Claim] | None = None) -> list[Finding]:
    """Decide the claims whose arms were both run; by default all claims of the bench."""
    decided = []
    for claim in claims_of(results.bench) if claims is None else claims:
        if {claim.arm, claim.other} <= set(results.arms):
            difference = results.difference(claim.arm, claim.other, claim.measure)
            decided.append(Finding(claim, difference, decide(claim, difference)))
    return decided
