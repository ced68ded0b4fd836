"""Groups rows into micro-batches by length.

TRL fixes how many micro-batches a step has (`gradient_accumulation_steps`); this module decides which rows share one.
Rows are sorted by length and cut into contiguous groups, so that short rows are not padded to long ones. The loss is a
sum divided once by the global token count, so the grouping changes no gradient.

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
"""The most rows for which the best cut is searched, in quadratic time. Beyond it, groups have equal numbers of rows."""

PASS_TOKENS = {"cpu": 64}
"""The fixed cost of a forward and backward pass, in tokens, by type of device. Measured on a CPU with 135M parameters
(docs/BENCHMARKS.md)."""
ACCELERATOR_PASS_TOKENS = 1024
"""The same for all other devices, which need many tokens at once to be efficient. An estimate, not measured."""


@dataclass(frozen=True, slots=True)
class Padded:
    """Right-padded rows. In a causal model, real tokens do not attend to the padding after them."""

    ids_BT: Tensor
    mask_BT: Tensor


def partition(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Cut rows into exactly `groups` groups with the fewest padded tokens.

    No group is larger (rows x longest row) than the largest group of an equal split, so sorting never costs memory.

    Args:
        lengths: Tokens of each row.
        groups: Number of groups, each of at least one row.

    Returns:
        The indices of each group's rows, shortest rows first.

    Raises:
        ConfigError: If there are fewer rows than groups.
    """
    count = len(lengths)
    if not 1 <= groups <= count:
        raise ConfigError(f"cannot split {count} rows into {groups} micro-batches of at least one row each")
    order = sorted(range(count), key=lambda row: lengths[row])
    if count > EXACT_ROWS:
        bounds = [count * group // groups for group in range(groups + 1)]
    else:
        bounds = _best_bounds(np.array([lengths[row] for row in order], dtype=np.int64), groups)
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def _best_bounds(sorted_lengths: np.ndarray, groups: int) -> list[int]:
    """The bounds of the groups, by dynamic programming: the least total area, with a cap on each group's area."""
    count = len(sorted_lengths)
    rows = np.arange(count + 1)
    # area[i, j]: tokens of rows i to j-1, padded to the longest of them, row j-1.
    area = (rows[None, :] - rows[:, None]) * np.concatenate([[0], sorted_lengths])[None, :]
    # The area of the largest group of an equal split.
    cap = -(-count // groups) * sorted_lengths[-1]
    # A quarter of the range, so that sums of impossible costs do not overflow.
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


def slices(sorted_lengths: Sequence[int], device: str = "cpu") -> list[slice]:
    """Cut rows that are sorted by length into contiguous slices, one forward pass each, at the least cost.

    The cost is the number of computed tokens, including padding, plus `PASS_TOKENS` per pass. Unsorted rows stay in one
    slice.

    Args:
        sorted_lengths: Tokens of each row.
        device: The type of device that computes.
    """
    count = len(sorted_lengths)
    if count > EXACT_ROWS or any(a > b for a, b in itertools.pairwise(sorted_lengths)):
        return [slice(0, count)]
    a_pass = PASS_TOKENS.get(device, ACCELERATOR_PASS_TOKENS)
    # cost[stop]: the least cost of the rows before `stop`, whose last slice begins at starts[stop].
    cost, starts = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.int64)
    for stop in range(1, count + 1):
        through = cost[:stop] + (stop - np.arange(stop)) * sorted_lengths[stop - 1]
        starts[stop] = through.argmin()
        cost[stop] = through[starts[stop]] + a_pass
    cuts, stop = [], count
    while stop:
        cuts.append(slice(int(starts[stop]), stop))
        stop = int(starts[stop])
    return cuts[::-1]


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
    """(B, T) bool: the positions whose hidden states predict response tokens in the loss.

    Args:
        prompt_lengths: Prompt tokens of each row.
        loss_masks: For each row, whether each response token is in the loss.
        padded_length: T.
    """
    positions_BT = torch.zeros((len(prompt_lengths), padded_length), dtype=torch.bool)
    for number, (prompt, mask) in enumerate(zip(prompt_lengths, loss_masks, strict=True)):
        # Logits at t predict token t + 1, so the last prompt token predicts the first response token.
        positions_BT[number, prompt - 1 : prompt - 1 + len(mask)] = torch.tensor(mask, dtype=torch.bool)
    return positions_BT
