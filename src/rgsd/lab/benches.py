"""Where arms are trained and measured: a model, its prompts by split, and the measures of a response.

The nano bench has a made-up world in which every seed is a task of its own. The bundled bench has a real model, by
default `embedded-warm`, and the project's own rubrics: all seeds share its prompts. Both are scored by exact checks.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rgsd.data.config import DataConfig, load_split
from rgsd.errors import ConfigError
from rgsd.evaluation.samples import Sample
from rgsd.lab.grid import Grid, Task, load_grid, standard_grid
from rgsd.lab.nano_scores import MAX_NEW_TOKENS
from rgsd.lab.world import Audit, World, write_jsonl
from rgsd.models import NANO
from rgsd.prompts.leaks import mentions_rubric
from rgsd.rubrics import Example

HELD_OUT, DEVELOPMENT = "held-out", "development"
_TAG = {HELD_OUT: "split:held-out", DEVELOPMENT: "split:dev"}
"""Split -> the tag of its prompts. Neither is trained on."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number per response.

    Args:
        text: What it is.
        heading: Of its column.
        unit: "score" (three decimals), "count" or "share" (in percent).
        printed: Whether the printed table has a column for it, too.
    """

    text: str
    heading: str
    unit: Literal["score", "count", "share"]
    printed: bool = True

    def format(self, value: float) -> str:
        """The value in a table; a dash where there is none."""
        if math.isnan(value):
            return "-"
        return {"score": f"{value:.3f}", "count": f"{value:.1f}", "share": f"{100 * value:.0f} %"}[self.unit]


_SATISFACTION = Measure("rubric satisfaction", "satisfaction", "score")
_TOKENS = Measure("tokens per response", "tokens", "count")
_NAMES = Measure("share of responses that mention a rubric", "mentions rubric", "share", printed=False)


@dataclass(frozen=True)
class Bench(ABC):
    """A model and its data.

    Args:
        model: Name of the model.
        max_new_tokens: Token limit of a measured response.
        batch_size: Responses measured at once.
        template: Teacher prompt of the conditioned arms of the untrained model.
    """

    model: str
    max_new_tokens: int
    batch_size: int
    template: str = "cover"

    measures: ClassVar[Mapping[str, Measure]]
    shares_prompts: ClassVar[bool]
    """Whether all seeds have the same prompts; otherwise each seed is a task of its own."""

    @abstractmethod
    def data_settings(self, file: Path) -> dict[str, Any]:
        """Settings that name the data of an arm. `file` is the seed's own data file, if it has one."""

    @abstractmethod
    def write_data(self, seed: int, task: Task, file: Path) -> None:
        """Write the seed's own data file, if the bench has one."""

    @abstractmethod
    def examples(self, seed: int, task: Task, split: str) -> list[Example]:
        """The prompts of a split, "held-out" or "development"."""

    @abstractmethod
    def values(self, samples: Sequence[Sample], seed: int, task: Task) -> dict[str, np.ndarray]:
        """Measure -> one value per sample, NaN where a sample has none."""

    def check(self, task: Task) -> None:
        """Raise a ConfigError if the bench does not have this task. By default, it has all."""
        return


@dataclass(frozen=True)
class NanoBench(Bench):
    """The nano model in its world."""

    model: str = NANO
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 96

    measures: ClassVar[Mapping[str, Measure]] = {
        "satisfaction": _SATISFACTION,
        "tokens": _TOKENS,
        "stated": Measure("facts stated per response", "facts", "count", printed=False),
        "to_the_point": Measure("share of stated facts that are true and asked for", "to the point", "share"),
        "false_share": Measure("share of false claims", "false", "share"),
        "names_rubric": _NAMES,
    }
    shares_prompts: ClassVar[bool] = False

    def data_settings(self, file: Path) -> dict[str, Any]:
        """See `Bench`."""
        return {"data": str(file)}

    def write_data(self, seed: int, task: Task, file: Path) -> None:
        """See `Bench`."""
        write_jsonl(self._world(seed, task).examples(think=task.think), file)

    def examples(self, seed: int, task: Task, split: str) -> list[Example]:
        """See `Bench`."""
        return self._world(seed, task).examples(_TAG[split].removeprefix("split:"), think=task.think)

    def values(self, samples: Sequence[Sample], seed: int, task: Task) -> dict[str, np.ndarray]:
        """See `Bench`."""
        world = self._world(seed, task)
        audits = [world.audit(s.example_id.split("-")[0], s.judged_text) for s in samples]
        return _columns(
            satisfaction=[s.score for s in samples],
            tokens=[s.n_tokens for s in samples],
            false_share=[a.n_false / max(1, len(a.claims)) for a in audits],
            stated=[len(a.claims) for a in audits],
            to_the_point=[_to_the_point(s, a, world) for s, a in zip(samples, audits, strict=True)],
            names_rubric=[mentions_rubric(s.response) for s in samples],
        )

    @staticmethod
    def _world(seed: int, task: Task) -> World:
        return World(task_seed=seed, generality=task.generality)


def _to_the_point(sample: Sample, audit: Audit, world: World) -> float:
    topic, modifier = sample.example_id.split("-")[:2]
    asked = {world.fact(topic, kind) for kind in world.ask(topic, modifier).kinds}
    return len(asked & set(audit.claims)) / max(1, len(audit.claims))


@dataclass(frozen=True)
class BundledBench(Bench):
    """A model of any size on prompts with programmatic checks, by default the bundled ones.

    Args:
        data: Settings of `DataConfig`; the prompts carry the tags `split:held-out` and `split:dev`.
    """

    max_new_tokens: int = 128
    batch_size: int = 42
    data: dict[str, Any] = field(default_factory=lambda: {"data": "bundled", "held_out_tags": list(_TAG.values())})

    measures: ClassVar[Mapping[str, Measure]] = {
        "satisfaction": _SATISFACTION,
        "form": Measure("share of the weight of form that is met", "form", "share"),
        "content": Measure("share of the weight of content that is met", "content", "share"),
        "safety": Measure("share of the weight of safety that is met", "safety", "share"),
        "pitfalls": Measure("share of the weight of pitfalls that is met", "pitfalls", "share"),
        "tokens": _TOKENS,
        "truncated": Measure("share of responses that were cut off", "cut off", "share", printed=False),
        "names_rubric": _NAMES,
    }
    shares_prompts: ClassVar[bool] = True

    def data_settings(self, file: Path) -> dict[str, Any]:
        """See `Bench`."""
        return dict(self.data)

    def write_data(self, seed: int, task: Task, file: Path) -> None:
        """See `Bench`."""

    def examples(self, seed: int, task: Task, split: str) -> list[Example]:
        """See `Bench`."""
        found = [e for e in load_split(DataConfig(**self.data)).held_out if _TAG[split] in e.tags]
        if not found:
            raise ConfigError(f"{self.data.get('data')!r} has no held-out prompt with the tag {_TAG[split]!r}")
        return found

    def values(self, samples: Sequence[Sample], seed: int, task: Task) -> dict[str, np.ndarray]:
        """See `Bench`."""
        return _columns(
            satisfaction=[s.score for s in samples],
            tokens=[s.n_tokens for s in samples],
            form=[_met(s, "form") for s in samples],
            content=[_met(s, "content") for s in samples],
            safety=[_met(s, "safety") for s in samples],
            pitfalls=[_met(s, "pitfall") for s in samples],
            truncated=[s.is_truncated for s in samples],
            names_rubric=[mentions_rubric(s.response, s.question) for s in samples],
        )

    def check(self, task: Task) -> None:
        """See `Bench`."""
        if task != Task():
            raise ConfigError(f"`world` belongs to the nano model's arms, {self.model} has one task: got {task}")


def _met(sample: Sample, tag: str) -> float:
    """Share of the weight of a tag's criteria that is met; NaN without any that is scored."""
    scored = [(abs(v.weight), v.value) for v in sample.verdicts if tag in v.tags and v.value is not None]
    total = sum(weight for weight, _ in scored)
    return sum(weight * value for weight, value in scored) / total if total else float("nan")


def _columns(**columns: Sequence[Any]) -> dict[str, np.ndarray]:
    # None, an unknown value, becomes NaN.
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}


def bench_of(
    model: str, grids: Sequence[str | Path] = (), settings: Mapping[str, Any] | None = None
) -> tuple[Bench, Grid]:
    """The bench of a model, with its grid.

    Args:
        model: `nano`, or any other model's name for the bundled data.
        grids, settings: As for `load_grid`.
    """
    if model == NANO:
        return NanoBench(), load_grid(grids, settings=settings)
    given = {"model_name_or_path": model, **(settings or {})}
    grid = load_grid(grids, standard=standard_grid("embedded.yaml"), settings=given)
    names = {f.name for f in dataclasses.fields(DataConfig)}
    data = {name: value for name, value in grid.shared.items() if name in names}
    sizes = {"max_new_tokens": "eval_max_new_tokens", "batch_size": "eval_generation_batch_size"}
    known = {name: int(grid.shared[setting]) for name, setting in sizes.items() if setting in grid.shared}
    return BundledBench(model, data=data, template=str(grid.shared.get("template", "cover")), **known), grid
