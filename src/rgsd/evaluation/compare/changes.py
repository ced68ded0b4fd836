"""What differs between two arms: scores, criteria won and lost, prompts, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgsd.evaluation.conclusions import conclude
from rgsd.evaluation.samples import CriterionVerdict, Sample
from rgsd.evaluation.statistics import holm, length_controlled, ratio, sign_test
from rgsd.evaluation.summaries import MOST_TEXTS, gains_by_tag, paired_difference

MOST_PROMPTS = 5
"""Prompts listed as most won, and as most lost."""


@dataclass(frozen=True, slots=True)
class Change:
    """One criterion of one prompt under two arms.

    Args:
        prompt: The example's id.
        text, tags, is_pitfall: The criterion.
        before, after: How good its verdict is under the first and the second arm, in [0, 1]. A pitfall is good when it
            is not met.
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


def difference(before: Sequence[Sample], after: Sequence[Sample], *, seed: int = 0) -> dict[str, Any]:
    """after minus before: the score, the criteria and prompts won and lost, and the part of length.

    Args:
        before, after: Samples of the same prompts under the same judge.
        seed: Seed of the bootstrap.
    """
    score = paired_difference(before, after, seed=seed)
    moved = changes(before, after)
    return {
        "difference": None if score is None else asdict(score),
        "conclusion": str(conclude(score)),
        "criteria": tally(moved, seed=seed),
        "gains_by_tag": gains_by_tag(before, after, seed=seed),
        "criteria_by_tag": _tallies(moved, lambda c: c.tags, seed, least_prompts=1),
        "criteria_by_text": _tallies(moved, lambda c: ((c.text, c.is_pitfall),), seed, least_prompts=2),
        "prompts": _prompts(before, after, moved),
        "length": length(before, after, seed=seed),
    }


def _pairs(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """The samples of the prompts that both have, in the order of `after`."""
    by_id = {s.example_id: s for s in before}
    return [(by_id[s.example_id], s) for s in after if s.example_id in by_id]


def changes(before: Sequence[Sample], after: Sequence[Sample]) -> list[Change]:
    """The criteria that both arms have and that were scored in both, matched by their text and sign."""
    by_id = {s.example_id: s for s in after}
    moved = []
    for sample in before:
        if sample.example_id not in by_id:
            continue
        others = by_criterion(by_id[sample.example_id])
        for key, verdict in by_criterion(sample).items():
            other = others.get(key)
            if other is not None and verdict.satisfied is not None and other.satisfied is not None:
                text, is_pitfall, _ = key
                moved.append(
                    Change(sample.example_id, text, verdict.tags, is_pitfall, verdict.satisfied, other.satisfied)
                )
    return moved


def by_criterion(sample: Sample) -> dict[tuple[str, bool, int], CriterionVerdict]:
    """Verdicts by text, sign, and occurrence: a rubric may repeat a criterion."""
    seen: Counter[tuple[str, bool]] = Counter()
    verdicts = {}
    for verdict in sample.verdicts:
        key = (verdict.criterion, verdict.is_pitfall)
        verdicts[(*key, seen[key])] = verdict
        seen[key] += 1
    return verdicts


def tally(moved: Sequence[Change], *, seed: int = 0, with_interval: bool = True) -> dict[str, Any]:
    """Count the criteria won and lost.

    Returns:
        n compared, won, lost, net, n_prompts; `net_share` (net over n, with its interval over prompts); `p`, from the
        two-sided exact sign test over prompts. A prompt is won if more of its criteria were won than lost.
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


def _tallies(
    moved: Sequence[Change], keys: Callable[[Change], Sequence[Hashable]], seed: int, *, least_prompts: int
) -> list[dict[str, Any]]:
    """Tallies by group, the most won first, with Holm's correction over the groups."""
    groups: dict[Any, list[Change]] = {}
    for change in moved:
        for key in keys(change):
            groups.setdefault(key, []).append(change)
    groups = {k: g for k, g in groups.items() if len({c.prompt for c in g}) >= least_prompts}
    # Thousands of recurring texts would each take a bootstrap; beyond MOST_TEXTS their p-values must do.
    with_interval = len(groups) <= MOST_TEXTS
    tallies = []
    for key, group in groups.items():
        name = {"group": key} if isinstance(key, str) else {"group": key[0], "is_pitfall": key[1]}
        tallies.append(name | tally(group, seed=seed, with_interval=with_interval))
    for entry, p in zip(tallies, holm([t["p"] for t in tallies]), strict=True):
        entry["p_holm"] = p
    return sorted(tallies, key=lambda t: (-t["net"], t["p"], t["group"]))


def _prompts(before: Sequence[Sample], after: Sequence[Sample], moved: Sequence[Change]) -> dict[str, Any]:
    by_prompt: dict[str, list[Change]] = {}
    for change in moved:
        by_prompt.setdefault(change.prompt, []).append(change)
    prompts = [
        {
            "example_id": b.example_id,
            "question": b.question,
            "difference": b.score - a.score,
            "before": a.score,
            "after": b.score,
            "won": [c.text for c in by_prompt.get(b.example_id, ()) if c.outcome > 0],
            "lost": [c.text for c in by_prompt.get(b.example_id, ()) if c.outcome < 0],
        }
        for a, b in _pairs(before, after)
        if a.score is not None and b.score is not None
    ]
    prompts.sort(key=lambda p: (-p["difference"], p["example_id"]))
    won = sum(p["difference"] > 0 for p in prompts)
    lost = sum(p["difference"] < 0 for p in prompts)
    return {
        "won": won,
        "lost": lost,
        "tied": len(prompts) - won - lost,
        "p": sign_test(won, lost),
        "most_won": [p for p in prompts[:MOST_PROMPTS] if p["difference"] > 0],
        "most_lost": [p for p in prompts[::-1][:MOST_PROMPTS] if p["difference"] < 0],
    }


def length(before: Sequence[Sample], after: Sequence[Sample], *, seed: int = 0) -> dict[str, Any]:
    """How much longer the responses of `after` are, and the difference that remains at equal length.

    Returns:
        `tokens` and `characters`: the mean of `after` over the mean of `before`, with its interval. Tokens are counted
        as generated, with reasoning; characters as the judge read them. `controlled`:
        `rgsd.evaluation.statistics.length_controlled` over characters.
    """
    pairs = _pairs(before, after)
    tokens = [(a.n_tokens, b.n_tokens) for a, b in pairs if a.n_tokens and b.n_tokens is not None]
    characters = [(len(a.judged_text), len(b.judged_text)) for a, b in pairs]
    scored = [(a, b, b.score - a.score) for a, b in pairs if a.score is not None and b.score is not None]
    controlled = length_controlled(
        [d for _, _, d in scored],
        [len(a.judged_text) for a, _, _ in scored],
        [len(b.judged_text) for _, b, _ in scored],
        seed=seed,
    )
    return {
        **{
            unit: asdict(ratio([b for _, b in sizes], [a for a, _ in sizes], seed=seed))
            for unit, sizes in (("tokens", tokens), ("characters", characters))
        },
        "controlled": asdict(controlled),
    }
