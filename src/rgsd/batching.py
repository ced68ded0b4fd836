"""Sequences into micro-batches by length.

TRL fixes how many micro-batches a step has (`gradient_accumulation_steps`); this module decides which rows share one.
Rows are sorted by length and cut into contiguous groups, so that short rows are not padded to long ones. Since the loss
is a sum divided once by the global token count, how rows are grouped changes no gradient.

Letters in names: B rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgsd.errors import ConfigError

EXACT_ROWS = 1024
"""Up to so many rows the best cut is searched for; above, groups are of equal row counts (the search is quadratic)."""

MOST_PADDING = 0.05
"""Share of the tokens of a forward pass that may be padding, before `slices` cuts it."""
LEAST_TOKENS = 1024
"""Tokens, padding included, below which a forward pass of its own costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Padded:
    """Right-padded rows: a causal model's states of the real tokens do not see what comes after them."""

    ids_BT: Tensor
    mask_BT: Tensor


def partition(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Cut rows into exactly `groups` groups with the fewest padded tokens.

    No group is larger (rows x longest row) than the largest of an equal split would be, so that sorting by length
    never costs memory.

    Args:
        lengths: tokens of each row.
        groups: how many groups, each of one row at least.

    Returns:
        The rows' indices, group by group, shortest rows first.

    Raises:
        ConfigError: when there are fewer rows than groups.
    """
    count = len(lengths)
    if not 1 <= groups <= count:
        raise ConfigError(f"cannot cut {count} rows into {groups} micro-batches of at least one row each")
    order = sorted(range(count), key=lambda row: lengths[row])
    if count > EXACT_ROWS:
        bounds = [count * group // groups for group in range(groups + 1)]
    else:
        bounds = _best_bounds(np.array([lengths[row] for row in order], dtype=np.int64), groups)
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def _best_bounds(sorted_lengths: np.ndarray, groups: int) -> list[int]:
    """Dynamic programme over where each group starts: least total area under the cap on one group's area."""
    count = len(sorted_lengths)
    rows = np.arange(count + 1)
    # area[i, j]: rows i..j-1 padded to the longest of them, row j-1.
    area = (rows[None, :] - rows[:, None]) * np.concatenate([[0], sorted_lengths])[None, :]
    cap = -(-count // groups) * sorted_lengths[-1]
    impossible = np.iinfo(np.int64).max // 4
    area = np.where((rows[None, :] > rows[:, None]) & (area <= cap), area, impossible)
    cost, starts = area[0], []
    for _ in range(groups - 1):
        through = np.minimum(cost[:, None] + area, impossible)
        starts.append(through.argmin(0))
        cost = through.min(0)
    bounds = [count]
    for start in reversed(starts):
        bounds.append(int(start[bounds[-1]]))
    return [0, *reversed(bounds)]


def slices(sorted_lengths: Sequence[int]) -> list[slice]:
    """Cut rows that are sorted by length into the fewest contiguous slices that pad little: `MOST_PADDING` of what they
    compute, or what is left when no slice computes fewer than `LEAST_TOKENS`. Unsorted rows are left in one."""
    count, real = len(sorted_lengths), sum(sorted_lengths)
    best = [slice(0, count)]
    if count > EXACT_ROWS or any(a > b for a, b in itertools.pairwise(sorted_lengths)):
        return best
    lengths = np.array(sorted_lengths, dtype=np.int64)
    area = count * sorted_lengths[-1]
    for groups in range(2, count + 1):
        if real >= (1 - MOST_PADDING) * area:
            break
        cut = [slice(a, b) for a, b in itertools.pairwise(_best_bounds(lengths, groups))]
        areas = [(s.stop - s.start) * sorted_lengths[s.stop - 1] for s in cut]
        if min(areas) < LEAST_TOKENS:
            break
        best, area = cut, sum(areas)
    return best


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """Stack rows of token ids, padded on the right to the longest."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask_BT[number, : len(row)] = 1
    return Padded(ids_BT, mask_BT)


def predicting_positions(
    prompt_lengths: Sequence[int], loss_masks: Sequence[Sequence[bool]], padded_length: int
) -> Tensor:
    """(B, T) bool: the positions whose hidden state predicts a response token that is in the loss.

    Args:
        prompt_lengths: prompt tokens of each row.
        loss_masks: for each row, whether each of its response tokens is in the loss.
        padded_length: T.
    """
    positions_BT = torch.zeros((len(prompt_lengths), padded_length), dtype=torch.bool)
    for number, (prompt, mask) in enumerate(zip(prompt_lengths, loss_masks, strict=True)):
        # Logits at t predict token t + 1.
        positions_BT[number, prompt - 1 : prompt - 1 + len(mask)] = torch.tensor(mask, dtype=torch.bool)
    return positions_BT
