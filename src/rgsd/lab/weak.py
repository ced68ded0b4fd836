"""Judges with known faults, for GRPO's reward in the laboratory: what a weak judge does to the policy that it trains.

They sit on the exact judge and spoil its verdicts, seeded: the same response to the same prompt always gets the same
verdict, as a language model at temperature 0 would give it. Nothing is ever measured with them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from rgsd.errors import ConfigError
from rgsd.judges import ChecksJudge, Judgement
from rgsd.judges.checks import sentences
from rgsd.rubrics import Example


class WeakJudge(ChecksJudge):
    """The exact judge with faults.

    Args:
        errors: the share of verdicts that are turned round, in [0, 1).
        leniency: how likely each sentence of a response makes the judge take an unmet criterion for met, or overlook a
            pitfall, in [0, 1): the longer the response, the kinder the judge.
        seed: of the faults.

    Raises:
        ConfigError: for a share out of range.
    """

    def __init__(self, errors: float = 0.0, leniency: float = 0.0, seed: int = 0) -> None:
        for name, value in (("errors", errors), ("leniency", leniency)):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name} is {value}: a share from 0 to below 1 is wanted")
        self.errors, self.leniency, self.seed = errors, leniency, seed
        self.name = f"weak(errors={errors:g}, leniency={leniency:g}, seed={seed})"

    def judge(self, example: Example, response: str) -> Judgement:
        """The exact verdicts, spoilt."""
        exact = super().judge(example, response)
        kindness = 1.0 - (1.0 - self.leniency) ** len(sentences(response))
        verdicts = []
        for number, (criterion, verdict) in enumerate(zip(example.rubric, exact.verdicts, strict=True)):
            good = not criterion.is_pitfall
            met = verdict.met
            if met is not None:
                if met != good and self._luck("kind", example.id, number, response) < kindness:
                    met = good
                if self._luck("wrong", example.id, number, response) < self.errors:
                    met = not met
            verdicts.append(replace(verdict, met=met))
        return replace(exact, verdicts=verdicts)

    def _luck(self, *key: object) -> float:
        """A number in [0, 1) that depends on the key and the seed alone."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / (1 << 56)
