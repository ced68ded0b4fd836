"""Scores of a nano model on the world's held-out prompts, and the comparison of a rebuilt and the shipped model."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgsd.errors import ConfigError, ModelError
from rgsd.evaluation.arms import judge_responses
from rgsd.files import atomic_write
from rgsd.inference import SamplingConfig, generate
from rgsd.judges import ChecksJudge
from rgsd.lab.world import World
from rgsd.prompts.leaks import mentions_rubric
from rgsd.prompts.messages import PromptSettings, teacher_prompts
from rgsd.prompts.thinking import strip_thinking

FILE = "figures.json"
MAX_NEW_TOKENS = 96
"""Token limit of a response. A thought followed by all twelve facts takes about 90 tokens."""


@dataclass(frozen=True, slots=True)
class ArmScores:
    """Scores of greedy responses to the held-out prompts.

    Args:
        satisfaction: Mean rubric satisfaction.
        false_share: Share of false claims among the claims about the animal in question.
        names_rubric: Share of the responses that mention a rubric, in the answer or in the reasoning.
        mean_tokens: Mean tokens per response, with reasoning.
        truncated_share: Share of the responses that were cut off.
    """

    satisfaction: float
    false_share: float
    names_rubric: float
    mean_tokens: float
    truncated_share: float


TOLERANCE = ArmScores(satisfaction=0.06, false_share=0.06, names_rubric=0.1, mean_tokens=3.0, truncated_share=0.02)
"""Largest difference from the shipped model's scores, in either direction, that counts as a match. See `compare`."""


@cache
def arms() -> dict[str, tuple[PromptSettings, bool]]:
    """Arm -> its prompt settings, and whether the model thinks first."""
    plain = {
        "base": PromptSettings("cover", privileged_context="none"),
        "base+rubric": PromptSettings("cover"),
        "base+rubric, paper template": PromptSettings("paper"),
        "base+rubric, system template": PromptSettings("system"),
        "base+reference": PromptSettings("cover", privileged_context="reference"),
        "base+both": PromptSettings("cover", privileged_context="both"),
        "base+mismatched": PromptSettings("cover", privileged_context="mismatched"),
    }
    thinking = {f"{name}, thinking": plain[name] for name in ("base", "base+rubric", "base+mismatched")}
    return {name: (settings, name in thinking) for name, settings in (plain | thinking).items()}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    names: Sequence[str] = (),
    n_prompts: int | None = None,
) -> dict[str, ArmScores]:
    """Score greedy responses to the world's held-out prompts with the exact judge.

    Args:
        model, tokenizer: The model and its tokenizer.
        world: The world whose prompts and rubrics to use.
        names: Keys of `arms`; all of them by default.
        n_prompts: Use only this many held-out prompts; all of them by default.

    Raises:
        ConfigError: If an arm is unknown.
    """
    if unknown := set(names) - set(arms()):
        raise ConfigError(f"unknown arms {sorted(unknown)}, known: {', '.join(arms())}")
    scores = {}
    for name in names or arms():
        settings, think = arms()[name]
        examples = world.examples("held-out", think=think)[:n_prompts]
        prompts = teacher_prompts(examples, settings)
        responses = generate(model, tokenizer, prompts, SamplingConfig(MAX_NEW_TOKENS), batch_size=96, label=name)
        samples = judge_responses(examples, responses, ChecksJudge(), arm=name)
        audits = [
            world.audit(e.metadata["topic"], strip_thinking(r.text)) for e, r in zip(examples, responses, strict=True)
        ]
        n = len(examples)
        scores[name] = ArmScores(
            satisfaction=sum(s.score or 0.0 for s in samples) / n,
            false_share=sum(a.n_false for a in audits) / max(1, sum(a.n_true + a.n_false for a in audits)),
            names_rubric=sum(mentions_rubric(r.text) for r in responses) / n,
            mean_tokens=sum(r.n_tokens for r in responses) / n,
            truncated_share=sum(r.is_truncated for r in responses) / n,
        )
    return scores


@dataclass(frozen=True, slots=True)
class NanoScores:
    """A nano model's scores with their provenance, as stored in its folder.

    Args:
        arms: Name of the arm -> its scores.
        n_prompts: Held-out prompts per arm.
        world: Digest of the world that the model was pretrained on.
        model_fingerprint: Fingerprint of the stored weights.
        n_parameters: Number of parameters.
        pretraining: The settings of the pretraining.
        loss: Mean over the last 100 steps, in nats per response token.
        tokens: Tokens read during pretraining, with padding.
        seconds: Duration of the pretraining.
        versions: Versions of Python, torch, transformers and tokenizers.
    """

    arms: dict[str, ArmScores]
    n_prompts: int
    world: str
    model_fingerprint: str
    n_parameters: int
    pretraining: dict[str, Any]
    loss: float
    tokens: int
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: str | Path) -> None:
        """Write the scores into a model's folder."""
        atomic_write(Path(folder, FILE), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> NanoScores:
        """Read the scores from a model's folder.

        Raises:
            ModelError: If the folder has no scores, or they have another format.
        """
        path = Path(folder, FILE)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**value, "arms": {name: ArmScores(**arm) for name, arm in value["arms"].items()}})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"cannot read {path} ({error}): pass a folder that `rgsd lab pretrain` wrote") from error


def versions() -> dict[str, str]:
    """Versions of the software that the weights depend on."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "tokenizers")}}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether a rebuilt model matches the shipped one, and a line for each score that does not, or for all."""

    matches: bool
    lines: tuple[str, ...]


def compare(rebuilt: NanoScores, shipped: NanoScores, tolerance: ArmScores = TOLERANCE) -> Comparison:
    """Compare a rebuilt model's scores with the shipped model's.

    Weights differ between machines, which sum floating-point numbers in different orders, but scores over 288 prompts
    differ little. The tolerances are wider than the differences between seeds of the pretraining.
    """
    if rebuilt.world != shipped.world:
        line = f"no match: pretrained on world {rebuilt.world}, the shipped model on world {shipped.world}"
        return Comparison(False, (line,))
    limits: Mapping[str, float] = asdict(tolerance)
    mismatches = []
    for name, expected in shipped.arms.items():
        if name not in rebuilt.arms:
            mismatches.append(f"no match: {name} was not measured")
            continue
        for score, limit in limits.items():
            got, want = getattr(rebuilt.arms[name], score), getattr(expected, score)
            if abs(got - want) > limit:
                mismatches.append(f"no match: {name}, {score} {got:.3f}, shipped {want:.3f}, tolerance {limit:g}")
    if mismatches:
        return Comparison(False, tuple(mismatches))
    n = len(shipped.arms) * len(limits)
    weights = "the same weights" if rebuilt.model_fingerprint == shipped.model_fingerprint else "different weights"
    return Comparison(True, (f"match: {n} scores of {len(shipped.arms)} arms within their tolerances ({weights})",))
