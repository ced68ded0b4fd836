"""A judge with known faults, used as GRPO's reward to show what a weak judge does to the policy that it trains.

It changes some of the exact judge's verdicts. The changes depend only on the seed, prompt and response, as with a
language model at temperature 0. The lab never measures with this judge.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from rgsd.errors import ConfigError
from rgsd.judges import ChecksJudge, Judgement
from rgsd.rubrics import Example
from rgsd.rubrics.checks import sentences


class WeakJudge(ChecksJudge):
    """The exact judge with faults.

    Args:
        errors: Share of the verdicts that are flipped, in [0, 1).
        leniency: Probability per sentence of a response, in [0, 1), that the judge takes an unmet criterion as met or
            overlooks a pitfall. Longer responses therefore score higher.
        seed: Seed of the faults.

    Raises:
        ConfigError: If a share is out of range.
    """

    def __init__(self, errors: float = 0.0, leniency: float = 0.0, seed: int = 0) -> None:
        for name, value in (("errors", errors), ("leniency", leniency)):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), got {value}")
        self.errors, self.leniency, self.seed = errors, leniency, seed
        self.name = f"weak(errors={errors:g}, leniency={leniency:g}, seed={seed})"

    def judge(self, example: Example, response: str) -> Judgement:
        """Judge exactly, then apply the faults."""
        exact = super().judge(example, response)
        p_lenient = 1.0 - (1.0 - self.leniency) ** len(sentences(response))
        verdicts = []
        for number, (criterion, verdict) in enumerate(zip(example.rubric, exact.verdicts, strict=True)):
            good = not criterion.is_pitfall
            met = verdict.met
            if met is not None:
                if met != good and self._uniform("kind", example.id, number, response) < p_lenient:
                    met = good
                if self._uniform("wrong", example.id, number, response) < self.errors:
                    met = not met
            verdicts.append(replace(verdict, met=met))
        return replace(exact, verdicts=verdicts)

    def _uniform(self, *key: object) -> float:
        """A uniform number in [0, 1) that depends only on the key and the seed."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / (1 << 56)
