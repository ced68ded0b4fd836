"""Runs that start from other runs: which run a base model comes from, and where that run is now.

run.json of such a run holds its lineage: one entry per earlier run, its parent first. The weights of each are known by
their identity, so a folder that was trained again since is not mistaken for the parent.
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
        run: its folder, as the command named it.
        id: the run's id.
        kind: how it was trained: rgsd, grpo or sft.
        weights: identity of its trained policy (`rgsd.models.trained_identity`).
    """

    run: str
    id: str
    kind: str
    weights: str


def is_run(name: str) -> bool:
    """Whether a model's name is a run's folder."""
    return (Path(name) / RECORD).is_file()


def ancestors(run: Run) -> list[Ancestor]:
    """The runs that a run's base model comes from, its parent first; empty for a run that starts from a model."""
    return [Ancestor(row["run"], row["id"], row["kind"], row["weights"]) for row in run.meta.get("lineage") or []]


def lineage_from(name: str, weights: str) -> list[dict[str, str]]:
    """What run.json says of a run that starts from the run `name`, whose trained policy has the identity `weights`.

    Raises:
        RunError: when `name` is no finished run.
    """
    parent = open_run(name, finished=True)
    own = Ancestor(name, str(parent.meta.get("id")), str(parent.meta.get("kind")), weights)
    return [asdict(a) for a in (own, *ancestors(parent))]


def base_of(run: Run) -> str:
    """The model that a run was trained from, as a name that can be loaded now.

    A parent run is looked for where the run's settings say, and beside the run itself, so that both can move together.

    Raises:
        ModelError: when the parent is in neither place.
    """
    name, line = str(run.settings.get("model_name_or_path")), ancestors(run)
    if not line:
        if is_run(name):
            # Without this, two folders that name each other would be followed for ever.
            raise ModelError(
                f"{run.folder} names the run {name} as its model, but its {RECORD} has no lineage: train it again with "
                f"--model_name_or_path {name}"
            )
        return name
    for place in (Path(name), run.folder.parent / Path(name).name):
        if is_run(str(place)) and _is(open_run(place).meta, line):
            return str(place)
    raise ModelError(
        f"{run.folder} was trained from the run {name} (id {line[0].id}), which is neither there nor in "
        f"{run.folder.parent.resolve()}: move that run back to one of these places. To be independent of it, export "
        "the model while both are in place: `rgsd export RUN --output_dir FOLDER`"
    )


def _is(meta: Mapping[str, Any], line: list[Ancestor]) -> bool:
    """Whether a run.json is that of the parent. A parent has fewer ancestors, so the search ends."""
    return meta.get("id") == line[0].id and len(meta.get("lineage") or []) < len(line)
