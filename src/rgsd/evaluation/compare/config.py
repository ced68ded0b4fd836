"""Settings of `rgsd compare`."""

from __future__ import annotations

from dataclasses import dataclass

from rgsd.settings import setting


@dataclass
class CompareConfig:
    """What is compared, by whose verdicts, and where the result goes."""

    arm: str | None = setting(None, "Arm of the runs that name none. Unset: `trained`, or the only one.")
    by: str | None = setting(None, "Judge whose verdicts decide. Unset: the first that scored every run.")
    judge2: list[str] = setting([], "Judges whose stored verdicts give the second opinion. Unset: all others.")
    data: str | None = setting(None, "Rubric data for --judge, when it moved since the runs were made.")
    schema: str | None = setting(None, "Schema of --data. Unset: detected from the rows.")
    seed: int = setting(0, "Seed of the bootstrap.")
    output: str | None = setting(None, "Write the whole comparison to this .json file.", aliases=["-o"])
