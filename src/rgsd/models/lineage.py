"""Runs that start from other runs: which run a base model comes from, and where that run is now.

The run.json of such a run holds its lineage: one entry per earlier run, its parent first. Each entry has the identity
of the run's weights, so a folder that was trained again since is not mistaken for the parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rgsd.errors import ModelError
from rgsd.runs import RECORD, Run, open_run


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An earlier run.

    Args:
        run: Its folder, as the command named it.
        id: The run's id.
        kind: How it was trained: rgsd, grpo or sft.
        weights: The identity of its trained policy (`rgsd.models.trained_identity`).
    """

    run: str
    id: str
    kind: str
    weights: str


def is_run(name: str) -> bool:
    """Whether a model's name is a run folder."""
    return (Path(name) / RECORD).is_file()


def ancestors(run: Run) -> list[Ancestor]:
    """The runs that a run's base model comes from, its parent first. Empty for a run that started from a model."""
    return [Ancestor(row["run"], row["id"], row["kind"], row["weights"]) for row in run.meta.get("lineage") or []]


def lineage_from(name: str, weights: str) -> list[dict[str, str]]:
    """The lineage in run.json of a run that starts from another run.

    Args:
        name: The folder of the parent.
        weights: The identity of the parent's trained policy.

    Raises:
        RunError: If the parent is not a finished run.
    """
    parent = open_run(name, finished=True)
    own = Ancestor(name, str(parent.meta.get("id")), str(parent.meta.get("kind")), weights)
    return [asdict(a) for a in (own, *ancestors(parent))]


def base_of(run: Run) -> str:
    """The name of the model that a run was trained from, as it can be loaded now.

    A parent run is searched for at the path in the run's settings and next to the run, so that both can move together.

    Raises:
        ModelError: If the parent is in neither place.
    """
    name, line = str(run.settings.get("model_name_or_path")), ancestors(run)
    if not line:
        if is_run(name):
            # Otherwise two folders that name each other would be followed forever.
            raise ModelError(
                f"the model of {run.folder} is the run {name}, but its {RECORD} has no lineage: train it again with "
                f"--model_name_or_path {name}"
            )
        return name
    for place in (Path(name), run.folder.parent / Path(name).name):
        if is_run(str(place)) and _is_parent(open_run(place).meta, line):
            return str(place)
    raise ModelError(
        f"{run.folder} was trained from the run {name} (id {line[0].id}), which is neither there nor in "
        f"{run.folder.parent.resolve()}: move that run back. To become independent of it, export the model while both "
        "are in place: `rgsd export RUN --output_dir FOLDER`"
    )


def _is_parent(meta: Mapping[str, Any], line: list[Ancestor]) -> bool:
    """Whether a run.json is that of the parent. A parent has fewer ancestors, so the search terminates."""
    return meta.get("id") == line[0].id and len(meta.get("lineage") or []) < len(line)
