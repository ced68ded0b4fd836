"""Samples the next token of each row from one uniform draw, so that no row depends on the others.

The draw inverts the cumulative distribution: nothing is sorted, and there is one random number per token rather than
one per vocabulary entry. Only top-k and top-p order entries, and only as many as they keep. The filters apply in the
order of transformers' `generate`: temperature, top-k, top-p, min-p.

Letters in names: B rows, V vocabulary entries, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgsd.errors import ConfigError, ModelError

BLOCK = 256
"""Vocabulary entries per block: a draw finds its block by the blocks' sums, then its entry within the block."""
TOP_ENTRIES = 512
"""Entries that top-p considers at first. A row in which these are not enough is sorted completely."""


class NonFiniteLogits(ModelError):
    """A model gave NaN or +inf for a next token, or -inf for all of them, so none can be sampled."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample the next token.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keep the most likely tokens until their probability reaches this; 1 keeps all.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        min_p: Keep tokens with at least this share of the most likely token's probability; 0 keeps all.

    Raises:
        ConfigError: If a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be at least 0 (greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], where 1 keeps all tokens, got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, which keeps all tokens, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1], where 0 keeps all tokens, got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def pick(logits_BV: Tensor, draws_B: Tensor | None, sampling: Sampling) -> Tensor:
    """(B,) the next tokens; see `pick_scored`."""
    return pick_scored(logits_BV, draws_B, sampling)[0]


def pick_scored(logits_BV: Tensor, draws_B: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample the next tokens, and report how likely each was.

    Args:
        logits_BV: Of the next token; entries of -inf are never sampled.
        draws_B: One uniform number from [0, 1) per row, in float64. None for greedy sampling.
        sampling: The settings.

    Returns:
        (B,) tokens, and (B,) the log-probability of each in nats, after temperature and filters, like vLLM's
        `processed_logprobs`. A greedy token has 0.

    Raises:
        NonFiniteLogits: If a row's maximum is not finite.
    """
    peak_B = check_logits(logits_BV)
    if sampling.is_greedy or draws_B is None:
        return logits_BV.argmax(-1), torch.zeros_like(peak_B, dtype=torch.float32)
    scores_BV = logits_BV.float()
    # Relative to the maximum, so that a temperature near 0 does not overflow.
    scores_BV = (scores_BV - peak_B[:, None]) / sampling.temperature
    draws_B = draws_B.to(scores_BV.device)
    vocabulary = scores_BV.size(-1)
    if 0 < sampling.top_k < vocabulary:
        scores_BK, entries_BK = scores_BV.topk(sampling.top_k, dim=-1)
        kept_BK = _nucleus(scores_BK.softmax(-1), sampling)
        at_B = _inverted(kept_BK, draws_B)
        return entries_BK.gather(1, at_B[:, None])[:, 0], _log_share(kept_BK, at_B)
    probs_BV = scores_BV.softmax(-1)
    if sampling.top_p == 1.0:
        kept_BV = _above_floor(probs_BV, sampling.min_p)
        at_B = _inverted(kept_BV, draws_B)
        return at_B, _log_share(kept_BV, at_B)
    # Most rows reach top_p within a few entries, and topk is far cheaper than a sort of the vocabulary.
    probs_BK, entries_BK = probs_BV.topk(min(TOP_ENTRIES, vocabulary), dim=-1)
    kept_BK = _nucleus(probs_BK, sampling)
    at_B = _inverted(kept_BK, draws_B)
    picked_B, log_p_B = entries_BK.gather(1, at_B[:, None])[:, 0], _log_share(kept_BK, at_B)
    # Flat rows need more entries than these to reach top_p.
    short_B = probs_BK.double().sum(-1) < sampling.top_p
    if vocabulary > TOP_ENTRIES and bool(short_B.any()):
        probs_RV, entries_RV = probs_BV[short_B].sort(dim=-1, descending=True, stable=True)
        kept_RV = _nucleus(probs_RV, sampling)
        at_R = _inverted(kept_RV, draws_B[short_B])
        picked_B[short_B] = entries_RV.gather(1, at_R[:, None])[:, 0]
        log_p_B[short_B] = _log_share(kept_RV, at_R)
    return picked_B, log_p_B


def _log_share(weights_BV: Tensor, at_B: Tensor) -> Tensor:
    """(B,) the logarithm of the chosen weight's share of its row's total."""
    return (weights_BV.gather(1, at_B[:, None])[:, 0] / weights_BV.sum(-1)).log()


def check_logits(logits_BV: Tensor) -> Tensor:
    """(B,) the largest logit of each row.

    Raises:
        NonFiniteLogits: If one of them is not finite.
    """
    peak_B = logits_BV.amax(-1)  # NaN if any logit of the row is
    if not bool(torch.isfinite(peak_B).all()):
        raise NonFiniteLogits(
            "the model's logits are not finite: a weight is damaged, or half precision overflowed (try dtype float32)"
        )
    return peak_B


def _above_floor(probs_BV: Tensor, min_p: float) -> Tensor:
    """Probabilities with 0 for those that min-p excludes."""
    if min_p == 0.0:
        return probs_BV
    return probs_BV.masked_fill(probs_BV < min_p * probs_BV.amax(-1, keepdim=True), 0.0)


def _nucleus(probs_BK: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities in descending order, with 0 for those that top-p and min-p exclude."""
    if sampling.top_p < 1.0:
        # An entry stays if the probability of all entries before it is below top_p.
        before_BK = probs_BK.double().cumsum(-1) - probs_BK
        before_BK[:, 0] = 0.0  # rounding must not exclude the most likely token
        probs_BK = probs_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    return _above_floor(probs_BK, sampling.min_p)


def _inverted(weights_BV: Tensor, draws_B: Tensor) -> Tensor:
    """(B,) the first index at which the cumulative weight exceeds the draw's share of the total."""
    vocabulary = weights_BV.size(-1)
    # float64: a float32 running total over a large vocabulary would lose entries of small probability.
    if vocabulary <= 4 * BLOCK:
        upto_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        return _first_above(upto_BV, draws_B[:, None] * upto_BV[:, -1:])[:, 0]
    # Zeros at the end are never sampled.
    if vocabulary % BLOCK:
        weights_BV = F.pad(weights_BV, (0, BLOCK - vocabulary % BLOCK))
    blocks = weights_BV.unflatten(-1, (-1, BLOCK))
    upto_BN = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target_B1 = draws_B[:, None] * upto_BN[:, -1:]
    block_B1 = _first_above(upto_BN, target_B1)
    inside_BW = blocks.gather(1, block_B1[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    before_B1 = F.pad(upto_BN, (1, 0)).gather(1, block_B1)
    return (block_B1 * BLOCK + _first_above(inside_BW, target_B1 - before_B1))[:, 0]


def _first_above(upto_BN: Tensor, target_B1: Tensor) -> Tensor:
    """(B, 1) the first index whose running total exceeds the target.

    Rounding can leave none; then it is the last index that adds to the total.
    """
    last_B1 = torch.searchsorted(upto_BN, upto_BN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(upto_BN, target_B1, right=True), last_B1)
