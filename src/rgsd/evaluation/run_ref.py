"""Names of what to measure or compare: `SOURCE[:ARM][+PRIVILEGED_CONTEXT]`, the same in every command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rgsd.errors import ConfigError, RunError
from rgsd.evaluation.samples import Sample, by_arm, read_samples
from rgsd.prompts.messages import PRIVILEGED_CONTEXTS
from rgsd.runs import RECORD, SAMPLES, TRAINED, Run, open_run

POLICIES = ("trained", "base")
"""The two policies of a run of `rgsd train`, `grpo` or `sft`: the model after training, and before."""


@dataclass(frozen=True, slots=True)
class RunRef:
    """A parsed name.

    Args:
        source: A run's folder, or a model: a hub id, a folder, a .gguf file, a server's model.
        arm: An arm of the run; empty for a model, or for the run's main arm.
        privileged_context: What the policy sees besides the prompt: none, rubric, mismatched, reference, both.
    """

    source: str
    arm: str = ""
    privileged_context: str = "none"

    @classmethod
    def parse(cls, text: str) -> RunRef:
        """Read a name. Colons and plus signs that belong to a folder's or an arm's name stay in it.

        Raises:
            ConfigError: If the name has no source.
        """
        if _is_run(text):
            return cls(text)
        rest, _, context = text.rpartition("+")
        if not rest or context not in PRIVILEGED_CONTEXTS:
            rest, context = text, "none"
        colons = [position for position, letter in enumerate(rest) if letter == ":"]
        # The first prefix that is a run is the source: arms may contain colons, and so may folders.
        split = next((position for position in colons if _is_run(rest[:position])), len(rest))
        source, arm = rest[:split], rest[split + 1 :]
        if not source or source.startswith((":", "+")):
            raise ConfigError(
                f"{text!r} names no model or run: expected SOURCE[:ARM][+rubric], for example runs/demo or "
                "owner/name+rubric"
            )
        return cls(source, arm, context)

    @classmethod
    def parse_policy(cls, text: str) -> RunRef:
        """Read the name of a policy that can generate: a model, a run's trained policy, or RUN:base.

        Raises:
            RunError: If a policy of a run is named, but the source is not a run.
            ConfigError: If the run has no such policy.
        """
        ref = cls.parse(text)
        if ref.is_run and ref.arm not in ("", *POLICIES):
            raise ConfigError(f"{text!r} names the arm {ref.arm!r}: a run has the policies {' and '.join(POLICIES)}")
        model, _, arm = ref.source.rpartition(":")
        if not ref.is_run and model and arm in POLICIES:
            raise RunError(f"{text!r} names a policy of a run, but {model} is not a run's folder (no {RECORD})")
        return ref

    @property
    def is_run(self) -> bool:
        """Whether the source is a run's folder."""
        return _is_run(self.source)

    @property
    def is_base(self) -> bool:
        """Whether the name means the model that a run was trained from."""
        return self.is_run and self.arm == "base"

    @property
    def policy(self) -> str:
        """The policy's name in tables: trained, base, or the model's own name."""
        return ("base" if self.is_base else "trained") if self.is_run else Path(self.source).name

    @property
    def policy_arm(self) -> str:
        """The name of an arm that evaluates the policy: `policy`, and what it is shown."""
        return _arm_name(self.policy, self.privileged_context)

    @property
    def stored_arm(self) -> str:
        """The name of the stored arm; empty for the run's main arm."""
        return _arm_name(self.arm, self.privileged_context) if self.arm else ""


def _is_run(source: str) -> bool:
    return (Path(source) / RECORD).is_file()


def _arm_name(policy: str, privileged_context: str) -> str:
    return policy if privileged_context == "none" else f"{policy}+{privileged_context}"


@dataclass(frozen=True, slots=True)
class EvalArm:
    """A stored arm of a run.

    Args:
        run: The open run.
        name: The arm's name.
        by_judge: Judge -> its samples by example, judges in the order in which they came.
        label: The arm's name in tables.
    """

    run: Run
    name: str
    by_judge: dict[str, dict[str, Sample]]
    label: str = ""

    @property
    def samples(self) -> list[Sample]:
        """One sample per prompt, by the last judge that judged it: for what depends on responses alone."""
        return list({s.example_id: s for samples in self.by_judge.values() for s in samples.values()}.values())


def stored_arms(ref: RunRef) -> list[EvalArm]:
    """The arms of a run that have samples: the named one, or all of them.

    Raises:
        RunError: If the source is not a run, has no samples, or does not have the named arm.
    """
    run = open_run(ref.source)
    arms = by_arm(read_samples(run))
    if not arms:
        raise RunError(
            f"{ref.source} has no judged responses (no {SAMPLES}): measure it first, `rgsd eval {ref.source} --judge J`"
        )
    wanted = ref.stored_arm
    if not wanted and ref.privileged_context != "none":
        wanted = _arm_name(main_arm(run, list(arms)) or "", ref.privileged_context)
    if wanted and wanted not in arms:
        raise RunError(
            f"{ref.source} has no arm {wanted!r}, its arms are {', '.join(arms)}: name one, "
            f"for example {ref.source}:{next(iter(arms))}"
        )
    return [_eval_arm(run, name, samples) for name, samples in arms.items() if name == (wanted or name)]


def _eval_arm(run: Run, name: str, samples: Sequence[Sample]) -> EvalArm:
    by_judge: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        by_judge.setdefault(sample.judge, {})[sample.example_id] = sample
    return EvalArm(run, name, by_judge)


def main_arm(run: Run, names: Sequence[str]) -> str | None:
    """The arm that a run is about: its trained policy, or its only arm; None if there are several others."""
    return run.arm_of(TRAINED, among=names) or (names[0] if len(names) == 1 else None)
