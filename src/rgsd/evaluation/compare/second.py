"""A second opinion: the same responses under another judge, and whether it comes to the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rgsd import data as datasets
from rgsd.errors import ConfigError, DataError, JudgeError, RunError
from rgsd.evaluation import statistics
from rgsd.evaluation.compare.changes import by_criterion
from rgsd.evaluation.compare.runs import Contender, Row, choose_judge, judges_of_all, shared_prompts
from rgsd.evaluation.evaluate import judged_fields
from rgsd.evaluation.statistics import agreement, interval
from rgsd.judges import Judge, Judgement
from rgsd.progress import counting, say
from rgsd.rubrics import Example
from rgsd.runs import SAMPLES, hold


def second_opinion(
    contenders: Sequence[Contender], judge: str, other: str, ids: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """What another judge says of the same responses, and whether the ranking survives it.

    Agreement is over every criterion of every contender that both judges scored, the first judge as the reference.
    Scores, differences and rankings are over the prompts that both judges scored for all contenders.
    """
    firsts = [{i: c.by_judge[judge][i] for i in ids} for c in contenders]
    seconds, n_other_text = [], 0
    for c, first in zip(contenders, firsts, strict=True):
        rows = {i: c.by_judge[other][i] for i in ids if i in c.by_judge[other]}
        same = {i: r for i, r in rows.items() if statistics.text_of(r) == statistics.text_of(first[i])}
        n_other_text += len(rows) - len(same)
        seconds.append(same)
    pairs = [_verdict_pairs(a, b) for a, b in zip(firsts, seconds, strict=True)]
    both = [
        i
        for i in ids
        if all(
            a[i]["score"] is not None and i in b and b[i]["score"] is not None
            for a, b in zip(firsts, seconds, strict=True)
        )
    ]
    found: dict[str, Any] = {
        "judge": other,
        "n_prompts": len(both),
        "n_other_response": n_other_text,
        "agreement": asdict(_agreement([p for part in pairs for p in part], seed)),
        "agreement_by_run": {
            c.label: asdict(_agreement(part, seed)) for c, part in zip(contenders, pairs, strict=True)
        },
        "met_share": _met_share([p for part in pairs for p in part]),
        "usage": statistics.usage_totals([r for rows in seconds for r in rows.values()]),
    }
    if not both:
        return found | {"scores": {}, "differences": [], "rankings": None, "is_ranking_kept": None}
    scores = {
        name: [interval([rows[i]["score"] for i in both], scoring=rows[both[0]]["scoring"], seed=seed) for rows in side]
        for name, side in ((judge, firsts), (other, seconds))
    }
    labels = [c.label for c in contenders]
    rankings = {
        name: [labels[k] for k in np.argsort([-v.mean for v in values], kind="stable")]
        for name, values in scores.items()
    }
    differences = []
    for k, label in enumerate(labels[1:], 1):
        one, two = (
            statistics.paired_difference([side[0][i] for i in both], [side[k][i] for i in both], seed=seed)
            for side in (firsts, seconds)
        )
        assert one is not None
        assert two is not None
        differences.append(
            {
                "run": label,
                "against": labels[0],
                "first": asdict(one),
                "second": asdict(two),
                "is_sign_kept": (one.mean > 0) == (two.mean > 0) and (one.mean < 0) == (two.mean < 0),
                "conclusion_first": str(statistics.conclude(one)),
                "conclusion_second": str(statistics.conclude(two)),
            }
        )
    return found | {
        "scores": {name: dict(zip(labels, map(asdict, values), strict=True)) for name, values in scores.items()},
        "differences": differences,
        "rankings": rankings,
        "is_ranking_kept": rankings[judge] == rankings[other],
    }


VerdictPair = tuple[str, bool, bool]
"""Prompt, what the first judge says, what the second says."""


def _verdict_pairs(first: Mapping[str, Row], second: Mapping[str, Row]) -> list[VerdictPair]:
    found = []
    for i, row in second.items():
        others = by_criterion(row)
        for key, entry in by_criterion(first[i]).items():
            one = statistics.is_met(entry)
            two = statistics.is_met(others[key]) if key in others else None
            if one is not None and two is not None:
                found.append((i, one, two))
    return found


def _agreement(pairs: Sequence[VerdictPair], seed: int) -> statistics.Agreement:
    return agreement([p[1] for p in pairs], [p[2] for p in pairs], [p[0] for p in pairs], seed=seed)


def _met_share(pairs: Sequence[VerdictPair]) -> dict[str, float] | None:
    if not pairs:
        return None
    return {"first": sum(p[1] for p in pairs) / len(pairs), "second": sum(p[2] for p in pairs) / len(pairs)}


def load_examples(contender: Contender, data: str | None = None, schema: str | None = None) -> dict[str, Example]:
    """The examples of a run's data by id, from where its settings say or from `data`.

    Raises:
        RunError: when its settings do not say.
        DataError: when the data cannot be read.
    """
    settings = contender.run.settings or {}
    source = data or settings.get("data")
    if not source:
        raise RunError(f"the settings of {contender.run.folder} name no data: say where its rubrics are with --data")
    if data is None:
        schema = settings.get("schema")
    loaded = datasets.load(source, schema=schema, split=settings.get("data_split"), skip_bad_rows=True)
    return {e.id: e for e in loaded.examples}


def rejudge(
    rows: Sequence[Row],
    examples: Mapping[str, Example],
    judge: Judge,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """The same responses under another judge.

    Args:
        rows: of any judge.
        examples: their examples by id.
        judge: who judges now.
        done: called with each new row as soon as it is there, in any order.

    Returns:
        one new row a row, in their order.

    Raises:
        DataError: when an example is missing, or is another one than the row's.
        JudgeError: when the judge cannot go on; what was judged has been passed to `done`.
    """
    tasks = [(_example_of(row, examples), statistics.text_of(row)) for row in rows]
    found: list[dict[str, Any] | None] = [None] * len(rows)
    with counting(f"{judge.name}: judgements", len(rows)) as counter:

        def keep(i: int, judgement: Judgement) -> None:
            row = _judged_row(rows[i], tasks[i][0], judge, judgement)
            found[i] = row
            if done is not None:
                done(row)
            counter.advance()

        judge.judge_all(tasks, done=keep)
    return [row for row in found if row is not None]


def _example_of(row: Row, examples: Mapping[str, Example]) -> Example:
    example = examples.get(row["example_id"])
    wanted = "the data that the run was measured on: name it with --data"
    if example is None:
        raise DataError(f"example {row['example_id']!r} is not among the {len(examples)} of the data, wanted {wanted}")
    texts = [v["criterion"] for v in row["verdicts"]]
    if [c.text for c in example.rubric] != texts or example.messages[-1]["content"] != row.get("question"):
        raise DataError(
            f"example {row['example_id']!r} has another prompt or rubric than the run's row, wanted {wanted}"
        )
    return example


def _judged_row(row: Row, example: Example, judge: Judge, judgement: Judgement) -> dict[str, Any]:
    return {**row, **judged_fields(example, statistics.text_of(row), judge, judgement)}


@dataclass(frozen=True, slots=True)
class SecondPlan:
    """What a judge that comes later is to judge, and what it is then.

    Args:
        by: the judge that is compared by, once it has judged.
        judge2: itself, where it is the second judge; nothing where it is the only one that judged all.
        ids: the examples that it judges; None: all.
    """

    by: str
    judge2: list[str]
    ids: list[str] | None


def plan_second(contenders: Sequence[Contender], name: str, by: str | None = None) -> SecondPlan:
    """A second opinion on the prompts that are compared; where no judge judged all the contenders, the only one.

    Raises:
        ConfigError: when the judge is the one that is compared by.
        RunError: when there is nothing to compare.
    """
    others = [j for j in judges_of_all(contenders) if j != name]
    is_first_everywhere = all(next(iter(c.by_judge)) == name for c in contenders)
    if by == name or is_first_everywhere:
        raise ConfigError(
            f"judge is {name!r}, which gave the verdicts that are compared: name another one, or compare by "
            "another with --by"
        )
    if not others and by is None:
        return SecondPlan(by=name, judge2=[], ids=None)
    judge = choose_judge(contenders, by or others[0])
    return SecondPlan(by=judge, judge2=[name], ids=shared_prompts(contenders, judge).ids)


def unjudged(contender: Contender, name: str, ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a contender, by the judge that came first, whose responses this judge has not judged completely.

    Args:
        contender: with its rows.
        name: the judge's.
        ids: look at these examples alone; None: all.
    """
    kept = {i for i, row in contender.by_judge.get(name, {}).items() if not row.get("problem")}
    rows = {i: row for judged in reversed(contender.by_judge.values()) for i, row in judged.items()}
    return [rows[i] for i in (rows if ids is None else ids) if i in rows and i not in kept]


def judge_again(
    contender: Contender, judge: Judge, examples: Mapping[str, Example], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Have a judge judge stored responses; its rows go to the run, one by one, and to the contender's `by_judge`.

    Args:
        contender: whose responses they are.
        judge: who judges now.
        examples: by id.
        rows: as `unjudged` gives them.

    Raises:
        DataError, JudgeError: as `rejudge`.
        RunError: when another process writes to the run.
    """
    hold(contender.run.folder)
    target = contender.by_judge.setdefault(judge.name, {})

    def keep(row: dict[str, Any]) -> None:
        contender.run.append(SAMPLES, [row])
        target[row["example_id"]] = row

    try:
        rejudge(rows, examples, judge, done=keep)
    except (JudgeError, KeyboardInterrupt):
        say(f"What was judged is in {contender.run.folder / SAMPLES}; the same command goes on from there.")
        raise
