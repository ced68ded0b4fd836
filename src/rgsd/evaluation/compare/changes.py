"""What is different between two runs: scores, criteria won and lost, prompts, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgsd.evaluation import statistics
from rgsd.evaluation.compare.runs import Row
from rgsd.evaluation.statistics import Estimate, holm, length_controlled, ratio, sign_test

MOST_PROMPTS = 5
"""Prompts listed as most won and most lost."""


@dataclass(frozen=True, slots=True)
class Change:
    """One criterion of one prompt under two arms.

    Args:
        prompt: the example's id.
        text, tags, is_pitfall: the criterion.
        before, after: how good its verdict is under the first and the second arm, in [0, 1]; a pitfall is good unmet.
    """

    prompt: str
    text: str
    tags: tuple[str, ...]
    is_pitfall: bool
    before: float
    after: float

    @property
    def outcome(self) -> int:
        """1 for won, -1 for lost, 0 for neither."""
        return (self.after > self.before) - (self.after < self.before)


def difference(rows_a: Sequence[Row], rows_b: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """b minus a: the score, the criteria and prompts won and lost, and what length has to do with it.

    Args:
        rows_a, rows_b: of the same prompts under the same judge.
        seed: of the bootstrap.
    """
    found = statistics.paired_difference(rows_a, rows_b, seed=seed)
    moved = changes(rows_a, rows_b)
    return {
        "difference": None if found is None else asdict(found),
        "conclusion": str(statistics.conclude(found)),
        "criteria": tally(moved, seed=seed),
        "criteria_by_tag": _tallied(moved, lambda c: c.tags, seed, least_prompts=1),
        "criteria_by_text": _tallied(moved, lambda c: ((c.text, c.is_pitfall),), seed, least_prompts=2),
        "prompts": _prompts(rows_a, rows_b, moved),
        "length": length(rows_a, rows_b, seed=seed),
    }


def changes(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[Change]:
    """The criteria that both arms have and the judge scored in both, by their text (and sign)."""
    b_by_id = {r["example_id"]: r for r in rows_b}
    found = []
    for a in rows_a:
        if a["example_id"] not in b_by_id:
            continue
        entries_b = by_criterion(b_by_id[a["example_id"]])
        for key, entry in by_criterion(a).items():
            other = entries_b.get(key)
            before = statistics.satisfied_value(entry)
            after = None if other is None else statistics.satisfied_value(other)
            if before is not None and after is not None:
                text, pitfall, _ = key
                found.append(Change(a["example_id"], text, tuple(entry.get("tags") or ()), pitfall, before, after))
    return found


def by_criterion(row: Row) -> dict[tuple[str, bool, int], Mapping[str, Any]]:
    """Entries by text, sign, and how often both stood before in the rubric."""
    seen: Counter[tuple[str, bool]] = Counter()
    found = {}
    for entry in row["verdicts"]:
        key = (entry["criterion"], entry["weight"] < 0)
        found[(*key, seen[key])] = entry
        seen[key] += 1
    return found


def tally(moved: Sequence[Change], *, seed: int = 0, with_interval: bool = True) -> dict[str, Any]:
    """How many criteria were won and lost.

    Returns:
        n compared, won, lost, net, n_prompts; `net_share` (net over n, with its interval over prompts); `p`: two-sided
        exact sign test over prompts, a prompt being won when more of its criteria were won than lost.
    """
    net: Counter[str] = Counter()
    n: Counter[str] = Counter()
    for change in moved:
        net[change.prompt] += change.outcome
        n[change.prompt] += 1
    won = sum(c.outcome > 0 for c in moved)
    lost = sum(c.outcome < 0 for c in moved)
    share = ratio([net[p] for p in n], [n[p] for p in n], seed=seed) if with_interval else None
    return {
        "n": len(moved),
        "won": won,
        "lost": lost,
        "net": won - lost,
        "n_prompts": len(n),
        "net_share": None if share is None else asdict(share),
        "p": sign_test(sum(v > 0 for v in net.values()), sum(v < 0 for v in net.values())),
    }


def _tallied(
    moved: Sequence[Change], keys: Callable[[Change], Sequence[Any]], seed: int, *, least_prompts: int
) -> list[dict[str, Any]]:
    """Tallies by group, the most won first; with Holm's correction for looking at all of them."""
    groups: dict[Any, list[Change]] = {}
    for change in moved:
        for key in keys(change):
            groups.setdefault(key, []).append(change)
    kept = {k: g for k, g in groups.items() if len({c.prompt for c in g}) >= least_prompts}
    # Thousands of recurring texts would take as many bootstraps: their p values say enough.
    few = len(kept) <= statistics.MOST_TEXTS
    found = []
    for key, group in kept.items():
        name = {"group": key} if isinstance(key, str) else {"group": key[0], "is_pitfall": key[1]}
        found.append(name | tally(group, seed=seed, with_interval=few))
    for one, p in zip(found, holm([f["p"] for f in found]), strict=True):
        one["p_holm"] = p
    return sorted(found, key=lambda f: (-f["net"], f["p"], f["group"]))


def _prompts(rows_a: Sequence[Row], rows_b: Sequence[Row], moved: Sequence[Change]) -> dict[str, Any]:
    a_by_id = {r["example_id"]: r for r in rows_a if r["score"] is not None}
    pairs = [(a_by_id[b["example_id"]], b) for b in rows_b if b["score"] is not None and b["example_id"] in a_by_id]
    by_prompt: dict[str, list[Change]] = {}
    for change in moved:
        by_prompt.setdefault(change.prompt, []).append(change)
    listed = [
        {
            "example_id": b["example_id"],
            "question": b.get("question"),
            "difference": b["score"] - a["score"],
            "before": a["score"],
            "after": b["score"],
            "won": [c.text for c in by_prompt.get(b["example_id"], ()) if c.outcome > 0],
            "lost": [c.text for c in by_prompt.get(b["example_id"], ()) if c.outcome < 0],
        }
        for a, b in sorted(pairs, key=lambda pair: (-(pair[1]["score"] - pair[0]["score"]), pair[1]["example_id"]))
    ]
    won = sum(p["difference"] > 0 for p in listed)
    lost = sum(p["difference"] < 0 for p in listed)
    return {
        "won": won,
        "lost": lost,
        "tied": len(listed) - won - lost,
        "p": sign_test(won, lost),
        "most_won": [p for p in listed[:MOST_PROMPTS] if p["difference"] > 0],
        "most_lost": [p for p in listed[::-1][:MOST_PROMPTS] if p["difference"] < 0],
    }


def length(rows_a: Sequence[Row], rows_b: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """How much longer b's responses are, and what is left of the difference at equal length.

    Returns:
        `tokens` and `characters`: b's mean over a's, with its interval; tokens as generated, reasoning included,
        characters as the judge read them. `controlled`: `rgsd.evaluation.statistics.length_controlled`, over
        characters.
    """
    a_by_id = {r["example_id"]: r for r in rows_a}
    pairs = [(a_by_id[b["example_id"]], b) for b in rows_b if b["example_id"] in a_by_id]
    scored = [(a, b) for a, b in pairs if a["score"] is not None and b["score"] is not None]
    counted = [(a["n_tokens"], b["n_tokens"]) for a, b in pairs if a.get("n_tokens") and b.get("n_tokens") is not None]

    def size(row: Row) -> int:
        return len(statistics.text_of(row))

    controlled = length_controlled(
        [b["score"] - a["score"] for a, b in scored],
        [size(a) for a, _ in scored],
        [size(b) for _, b in scored],
        seed=seed,
    )
    return {
        "tokens": asdict(_inflation(counted, seed)),
        "characters": asdict(_inflation([(size(a), size(b)) for a, b in pairs], seed)),
        "controlled": asdict(controlled),
    }


def _inflation(pairs: Sequence[tuple[int, int]], seed: int) -> Estimate:
    return ratio([b for _, b in pairs], [a for a, _ in pairs], seed=seed)
