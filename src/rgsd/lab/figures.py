"""What a nano model reaches on the world's held-out prompts, and whether a rebuilt one matches the shipped one."""

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
from rgsd.inference import SamplingConfig, generate
from rgsd.judges import ChecksJudge
from rgsd.lab.world import World
from rgsd.prompts.leaks import mentions_rubric
from rgsd.prompts.messages import PromptSettings, teacher_prompts
from rgsd.prompts.thinking import strip_thinking

FILE = "figures.json"
MAX_NEW_TOKENS = 96
"""Longest response that the figures are taken on; all twelve facts after a thought are about 90 tokens."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What came of one way of asking, on the held-out prompts, greedily.

    Args:
        satisfaction: mean rubric satisfaction.
        false_share: of the claims about the animal in question, the share that is false.
        names_rubric: share of the responses that speak of a rubric, reasoning included.
        mean_tokens: of a response, reasoning included.
        truncated_share: responses cut off before their end.
    """

    satisfaction: float
    false_share: float
    names_rubric: float
    mean_tokens: float
    truncated_share: float


TOLERANCE = Arm(satisfaction=0.06, false_share=0.06, names_rubric=0.1, mean_tokens=3.0, truncated_share=0.02)
"""How far a rebuilt model's figures may lie from the shipped one's, either way. See `compare`."""


@cache
def arms() -> dict[str, tuple[PromptSettings, bool]]:
    """Arm -> what the prompt carries, and whether the model thinks first."""
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
) -> dict[str, Arm]:
    """Greedy responses to the world's held-out prompts, decided by their checks.

    Args:
        model, tokenizer: any model that reads the world's words.
        world: whose prompts and rubrics.
        names: of `arms`; all of them by default.
        n_prompts: only the first so many held-out prompts.

    Raises:
        ConfigError: for an unknown arm.
    """
    if unknown := set(names) - set(arms()):
        raise ConfigError(f"unknown arm {sorted(unknown)}, known: {', '.join(arms())}")
    found = {}
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
        found[name] = Arm(
            satisfaction=sum(s.score or 0.0 for s in samples) / n,
            false_share=sum(a.n_false for a in audits) / max(1, sum(a.n_true + a.n_false for a in audits)),
            names_rubric=sum(mentions_rubric(r.text) for r in responses) / n,
            mean_tokens=sum(r.n_tokens for r in responses) / n,
            truncated_share=sum(r.is_truncated for r in responses) / n,
        )
    return found


@dataclass(frozen=True, slots=True)
class Figures:
    """A nano model's figures, with where they come from.

    Args:
        arms: name -> what was reached.
        n_prompts: held-out prompts of each arm.
        world: digest of the facts that the model was pretrained on.
        model_fingerprint: of the stored weights.
        n_parameters: of the model.
        pretraining: its settings.
        loss: mean over the last 100 steps, in nats a token of the responses.
        tokens: read in pretraining, padding included.
        seconds: of pretraining.
        versions: of Python, torch, transformers, tokenizers.
    """

    arms: dict[str, Arm]
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
        """Into the model's folder."""
        Path(folder, FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Figures:
        """From a model's folder.

        Raises:
            ModelError: when the folder has no figures, or not these.
        """
        path = Path(folder, FILE)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**value, "arms": {name: Arm(**arm) for name, arm in value["arms"].items()}})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}): a folder that rgsd.lab.nano.pretrain wrote is wanted"
            ) from error


def versions() -> dict[str, str]:
    """Of what decides the weights beside the seed."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "tokenizers")}}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether a rebuilt model matches the shipped one, and a line for each figure that does not, or for the whole."""

    matches: bool
    lines: tuple[str, ...]


def compare(rebuilt: Figures, shipped: Figures, tolerance: Arm = TOLERANCE) -> Comparison:
    """Hold a rebuilt model's figures to the shipped one's: each within its tolerance, in either direction.

    Weights differ from machine to machine, since floating-point sums are taken in another order there; figures over 288
    prompts differ little. The tolerances are wider than what other seeds of the pretraining differ by.
    """
    if rebuilt.world != shipped.world:
        line = f"no match: pretrained on other facts (world {rebuilt.world}, the shipped model's is {shipped.world})"
        return Comparison(False, (line,))
    allowed: Mapping[str, float] = asdict(tolerance)
    wrong = []
    for name, wanted in shipped.arms.items():
        if name not in rebuilt.arms:
            wrong.append(f"no match: {name} was not measured")
            continue
        for figure, limit in allowed.items():
            got, want = getattr(rebuilt.arms[name], figure), getattr(wanted, figure)
            if abs(got - want) > limit:
                wrong.append(f"no match: {name}, {figure} {got:.3f}, shipped {want:.3f}, allowed +-{limit:g}")
    if wrong:
        return Comparison(False, tuple(wrong))
    n = len(shipped.arms) * len(allowed)
    same = "the same weights" if rebuilt.model_fingerprint == shipped.model_fingerprint else "other weights"
    return Comparison(True, (f"match: {n} figures of {len(shipped.arms)} arms within their tolerances ({same})",))
