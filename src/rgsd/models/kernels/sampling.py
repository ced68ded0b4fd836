"""The next word of each row, picked by one draw of its own: what a row gets depends on no other row.

The draw inverts the cumulative distribution. Nothing is sorted and no vocabulary of random numbers is drawn; words are
ordered only for top-k and top-p, and then only as many as these keep. The warpers apply in the order of transformers'
`generate`: temperature, top-k, top-p, min-p.

Letters in names: B rows, V words, K words kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgsd.errors import ConfigError, ModelError

BLOCK = 256
"""Words whose probabilities are summed first; the draw finds its block, then its word in it."""
LIKELIEST = 512
"""Words that top-p looks at first. Rows whose likeliest words do not reach it are sorted whole."""


class NonFiniteLogits(ModelError):
    """A model gave NaN or +inf for a next token, or -inf for all of them: there is none to pick."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a next word is picked.

    Args:
        temperature: divides the logits; 0 takes the likeliest word.
        top_p: keep the likeliest words until they have this probability together; 1 keeps all.
        top_k: keep so many of the likeliest words; 0 keeps all.
        min_p: keep words with at least this share of the likeliest word's probability; 0 keeps all.

    Raises:
        ConfigError: for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}: 0 (greedy) or more is wanted")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: a share above 0, up to 1 (all words) is wanted")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: a count of words, or 0 (all words) is wanted")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}: a share from 0 (all words) to 1 is wanted")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def pick(logits_BV: Tensor, draws_B: Tensor | None, how: Sampling) -> Tensor:
    """(B,) the next tokens; see `pick_scored`."""
    return pick_scored(logits_BV, draws_B, how)[0]


def pick_scored(logits_BV: Tensor, draws_B: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
    """(B,) the next tokens, and the log-probability in nats with which each was picked: after temperature and
    truncation, as vLLM's `processed_logprobs`. A greedy pick has 0.

    Args:
        logits_BV: of the next words; -inf never comes.
        draws_B: uniform from 0 to 1, one a row, in float64. None for a greedy pick.
        how: the settings.

    Raises:
        NonFiniteLogits: for a row without a finite maximum.
    """
    peak_B = check_logits(logits_BV)
    if how.is_greedy or draws_B is None:
        return logits_BV.argmax(-1), torch.zeros_like(peak_B, dtype=torch.float32)
    scores_BV = logits_BV.float()
    # From the maximum, so that a temperature near 0 does not overflow.
    scores_BV = (scores_BV - peak_B[:, None]) / how.temperature
    draws_B = draws_B.to(scores_BV.device)
    vocabulary = scores_BV.size(-1)
    if 0 < how.top_k < vocabulary:
        scores_BK, words_BK = scores_BV.topk(how.top_k, dim=-1)
        kept_BK = _nucleus(scores_BK.softmax(-1), how)
        at_B = _inverted(kept_BK, draws_B)
        return words_BK.gather(1, at_B[:, None])[:, 0], _log_share(kept_BK, at_B)
    probs_BV = scores_BV.softmax(-1)
    if how.top_p == 1.0:
        kept_BV = _above_floor(probs_BV, how.min_p)
        at_B = _inverted(kept_BV, draws_B)
        return at_B, _log_share(kept_BV, at_B)
    probs_BK, words_BK = probs_BV.topk(min(LIKELIEST, vocabulary), dim=-1)
    kept_BK = _nucleus(probs_BK, how)
    at_B = _inverted(kept_BK, draws_B)
    picked_B, log_p_B = words_BK.gather(1, at_B[:, None])[:, 0], _log_share(kept_BK, at_B)
    short_B = probs_BK.double().sum(-1) < how.top_p
    if vocabulary > LIKELIEST and bool(short_B.any()):
        probs_RV, words_RV = probs_BV[short_B].sort(dim=-1, descending=True, stable=True)
        kept_RV = _nucleus(probs_RV, how)
        at_R = _inverted(kept_RV, draws_B[short_B])
        picked_B[short_B] = words_RV.gather(1, at_R[:, None])[:, 0]
        log_p_B[short_B] = _log_share(kept_RV, at_R)
    return picked_B, log_p_B


def _log_share(weights_BV: Tensor, at_B: Tensor) -> Tensor:
    """(B,) the logarithm of one weight's share of its row's total."""
    return (weights_BV.gather(1, at_B[:, None])[:, 0] / weights_BV.sum(-1)).log()


def check_logits(logits_BV: Tensor) -> Tensor:
    """(B,) each row's greatest logit.

    Raises:
        NonFiniteLogits: when one of them is not finite.
    """
    peak_B = logits_BV.amax(-1)  # NaN if any logit of the row is
    if not bool(torch.isfinite(peak_B).all()):
        raise NonFiniteLogits("the model's logits are not finite: a weight is damaged, or a product overflowed")
    return peak_B


def _above_floor(probs_BV: Tensor, min_p: float) -> Tensor:
    if min_p == 0.0:
        return probs_BV
    return probs_BV.masked_fill(probs_BV < min_p * probs_BV.amax(-1, keepdim=True), 0.0)


def _nucleus(probs_BK: Tensor, how: Sampling) -> Tensor:
    """Probabilities in falling order, those outside of top-p and min-p set to 0."""
    if how.top_p < 1.0:
        before_BK = probs_BK.double().cumsum(-1) - probs_BK
        before_BK[:, 0] = 0.0  # the likeliest word stays, whatever rounding says
        probs_BK = probs_BK.masked_fill(before_BK >= how.top_p, 0.0)
    return _above_floor(probs_BK, how.min_p)


def _inverted(weights_BV: Tensor, draws_B: Tensor) -> Tensor:
    """(B,) the first place at which the cumulative weight exceeds the draw's share of the total."""
    vocabulary = weights_BV.size(-1)
    if vocabulary <= 4 * BLOCK:
        upto_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        return _first_above(upto_BV, draws_B[:, None] * upto_BV[:, -1:])[:, 0]
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
    """(B, 1) the first index whose running total exceeds the target; where rounding leaves none, the last that adds."""
    last_B1 = torch.searchsorted(upto_BN, upto_BN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(upto_BN, target_B1, right=True), last_B1)
