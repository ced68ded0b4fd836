import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgsd.errors import ConfigError
from rgsd.models.batching import EXACT_ROWS, PASS_TOKENS, pad_right, partition, predicting_positions, slices


def area(lengths, groups):
    return sum(len(g) * max(lengths[i] for i in g) for g in groups)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.data())
def test_every_row_once_and_no_group_larger_than_an_equal_split(lengths, data):
    groups = data.draw(st.integers(1, len(lengths)))
    cut = partition(lengths, groups)
    assert len(cut) == groups
    assert all(cut)
    assert sorted(itertools.chain(*cut)) == list(range(len(lengths)))
    cap = -(-len(lengths) // groups) * max(lengths)
    assert max(len(g) * max(lengths[i] for i in g) for g in cut) <= cap


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_no_contiguous_cut_pads_less(groups):
    lengths = [3, 90, 4, 88, 5, 40, 41, 7]
    ordered = sorted(lengths)
    cap = -(-len(lengths) // groups) * max(lengths)
    best = None
    for inner in itertools.combinations(range(1, len(lengths)), groups - 1):
        parts = [ordered[a:b] for a, b in itertools.pairwise([0, *inner, len(lengths)])]
        if all(len(p) * p[-1] <= cap for p in parts):
            total = sum(len(p) * p[-1] for p in parts)
            best = total if best is None else min(best, total)
    assert area(lengths, partition(lengths, groups)) == best


def test_many_rows_are_cut_into_equal_counts():
    cut = partition(list(range(1, EXACT_ROWS + 3)), 2)
    assert [len(g) for g in cut] == [(EXACT_ROWS + 2) // 2] * 2


def test_fewer_rows_than_groups_is_refused():
    with pytest.raises(ConfigError, match="2 rows into 3 micro-batches"):
        partition([1, 2], 3)


def test_padding_and_positions():
    padded = pad_right([[5, 6, 7], [8]], pad_id=0)
    assert padded.ids_BT.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert padded.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    # Prompt of 2, response of 3 whose middle token is masked: logits at t predict token t + 1.
    positions = predicting_positions([2], [[True, False, True]], 6)
    assert torch.equal(positions, torch.tensor([[False, True, False, True, False, False]]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9).map(sorted))
def test_no_slices_cost_less(lengths):
    """Compare the cost (padded tokens, and a fixed cost per pass) with that of every possible cut."""

    def cost(bounds):
        parts = [lengths[a:b] for a, b in itertools.pairwise(bounds)]
        return sum(len(p) * p[-1] + PASS_TOKENS["cpu"] for p in parts)

    cut = slices(lengths)
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(len(lengths)))
    inner = range(1, len(lengths))
    every = (c for n in range(len(lengths)) for c in itertools.combinations(inner, n))
    assert cost([0, *(part.stop for part in cut)]) == min(cost([0, *c, len(lengths)]) for c in every)


def test_slices_of_uneven_rows_pad_little_and_even_ones_stay_whole():
    uneven = [400, 410, 420, 2000, 2050]
    assert slices(uneven) == [slice(0, 3), slice(3, 5)]
    assert slices([1000] * 6) == [slice(0, 6)]
    assert slices([5, 6, 20]) == [slice(0, 3)]  # too few tokens to be worth a pass
    assert slices([100, 110, 600]) == [slice(0, 2), slice(2, 3)]
    assert slices([100, 110, 600], "cuda") == [slice(0, 3)]  # an accelerator wants more of them
    assert slices([2000, 400]) == [slice(0, 2)]  # not sorted
