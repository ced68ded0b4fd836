"""The clipped generalized Jensen-Shannon divergence between teacher and student, plain and chunked.

Sources: RGSD (arXiv 2606.12507) for the loss, GKD (arXiv 2306.13649) for the generalized divergence, OPSD
(arXiv 2601.18734) for the clip per vocabulary entry. For a response token n, with p = softmax(logits / temperature)
and m = beta p_T + (1 - beta) p_S, the term of vocabulary entry v, in nats, is

    beta = 0        l[n,v] = p_T (log p_T - log p_S)                                  KL(teacher || student)
    beta = 1        l[n,v] = p_S (log p_S - log p_T)                                  KL(student || teacher)
    0 < beta < 1    l[n,v] = beta p_T log(p_T / m) + (1 - beta) p_S log(p_S / m)

and the token's loss is sum_v min(l[n,v], tau) with clip = "entry", min(sum_v l[n,v], tau) with clip = "token",
and sum_v l[n,v] with clip = "none". Gradients reach only the student.

`divergence` is the plain maths on two tensors of logits. `chunked_divergence` computes the same from hidden states and
heads, and never holds more than one chunk of either model's logits.

With `contrast` = gamma > 0 the teacher is contrastive: log p_T = log p(right) + gamma (log p(right) - log p(contrast)),
normalised over the vocabulary, where the contrast is the teacher that sees another prompt's rubric. Logits differ from
log-probabilities by a constant per token, so p_T = softmax(((1 + gamma) z_right - gamma z_contrast) / temperature).

Letters in names: N response tokens in the loss, C tokens of a chunk, V vocabulary entries, H hidden width, K the
teacher's top-k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgsd.errors import ConfigError
from rgsd.models.kernels.products import linear

Clip = Literal["entry", "token", "none"]

CHUNK_ELEMENTS = 1 << 22
"""Logits of one model in a chunk, if `chunk_tokens` is not given: 16 MiB in float32."""
CPU_CHUNK_ELEMENTS = 1 << 23
"""The same on a CPU, where a chunk needs less memory besides its logits: 32 MiB."""
BLOCK_ELEMENTS = 1 << 19
"""Logits that a CPU processes at a time within a chunk, so that they stay in its cache: 2 MiB."""
ARGMAX_BLOCK = 64
"""Vocabulary entries per block when searching for the most likely one on a CPU."""


@dataclass(frozen=True, slots=True)
class DivergenceSpec:
    """The divergence to compute.

    Args:
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), 0.5 the Jensen-Shannon divergence.
        clip: "entry" caps each vocabulary entry (OPSD), "token" the sum of a token, "none" nothing.
        clip_threshold: The cap, in nats.
        temperature: Divides the logits of both models.
        top_k: Compare only the teacher's k most likely tokens, and one bucket for all others. None compares all.
        chunk_tokens: Tokens whose logits are held at once. None means `CHUNK_ELEMENTS` / V, or on a CPU
            `CPU_CHUNK_ELEMENTS` / V.
        contrast: Gamma of the contrastive teacher; 0 is the plain one.

    Raises:
        ConfigError: If a value is out of range.
    """

    beta: float = 0.5
    clip: Clip = "entry"
    clip_threshold: float = 0.05
    temperature: float = 1.0
    top_k: int | None = None
    chunk_tokens: int | None = None
    contrast: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"beta must lie in [0, 1], got {self.beta}: 0 is forward KL, 0.5 JSD, 1 reverse KL")
        if self.clip not in ("entry", "token", "none"):
            raise ConfigError(f"clip must be 'entry', 'token' or 'none', got {self.clip!r}")
        if not (math.isfinite(self.clip_threshold) and self.clip_threshold > 0):
            raise ConfigError(
                f"clip_threshold must be positive, in nats, got {self.clip_threshold}; to disable it, set clip='none'"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"the temperature of the loss must be positive, got {self.temperature}")
        if not (math.isfinite(self.contrast) and self.contrast >= 0):
            raise ConfigError(f"teacher_contrast must be finite and at least 0 (off), got {self.contrast}")
        for name in ("top_k", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 or None, got {value}")


@dataclass(frozen=True, slots=True)
class Head:
    """How hidden states become logits: softcap * tanh(scale * (h W' + b) / softcap).

    Args:
        weight_VH: The output embedding.
        bias_V: Its bias, or None.
        scale: Multiplies the logits before the soft cap.
        softcap: The soft cap (Gemma), or None.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another precision. Gradients still reach the original weight."""
        return replace(
            self, weight_VH=self.weight_VH.to(dtype), bias_V=None if self.bias_V is None else self.bias_V.to(dtype)
        )

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """(C, V) logits in float32, or float64 for float64 states."""
        logits_CV = linear(hidden_CH, self.weight_VH, self.bias_V)
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence and its details. Only `total` carries a gradient.

    Args:
        total: The clipped divergence summed over tokens, in nats. Divide it once, by the global count.
        count: N.
        clipped_N: Each token's clipped divergence, in nats.
        unclipped_N: Each token's divergence before the clip, in nats.
        is_clipped_N: Whether the clip changed the token.
        student_entropy_N, teacher_entropy_N: In nats, over the full vocabulary.
        teacher_top_N: The teacher's most likely token.
        sampled_log_p_N: The student's log-probability of each sampled token, if these were given.
    """

    total: Tensor
    count: int
    clipped_N: Tensor
    unclipped_N: Tensor
    is_clipped_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    teacher_top_N: Tensor
    sampled_log_p_N: Tensor | None = None


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    spec: DivergenceSpec,
    contrast_logits_NV: Tensor | None = None,
) -> Divergence:
    """The plain maths: autograd over the full logits of N tokens. No gradient reaches the teacher.

    Memory grows with N x V. Training uses `chunked_divergence`, which the tests compare with this function.

    Args:
        student_logits_NV, teacher_logits_NV: Before the temperature.
        spec: The divergence to compute.
        contrast_logits_NV: Of the teacher that sees another prompt's rubric, if `spec.contrast` is above 0.
    """
    _check_contrast(spec, contrast_logits_NV)
    student_NV = F.log_softmax(_at_least_float(student_logits_NV) / spec.temperature, dim=-1)
    teacher_NV = F.log_softmax(_at_least_float(teacher_logits_NV).detach() / spec.temperature, dim=-1)
    if contrast_logits_NV is not None:
        contrast_NV = F.log_softmax(_at_least_float(contrast_logits_NV).detach() / spec.temperature, dim=-1)
        teacher_NV = F.log_softmax(teacher_NV + spec.contrast * (teacher_NV - contrast_NV), dim=-1)
    student, teacher = student_NV, teacher_NV
    if spec.top_k is not None and spec.top_k < student_NV.size(-1):
        top_NK = teacher_NV.topk(spec.top_k, dim=-1).indices
        student, teacher = _with_tail(student_NV, top_NK), _with_tail(teacher_NV, top_NK)

    if spec.beta == 0.0:
        entries = teacher.exp() * (teacher - student)
    elif spec.beta == 1.0:
        entries = student.exp() * (student - teacher)
    else:
        log_m = torch.logaddexp(teacher + math.log(spec.beta), student + math.log1p(-spec.beta))
        entries = spec.beta * teacher.exp() * (teacher - log_m) + (1 - spec.beta) * student.exp() * (student - log_m)

    unclipped_N = entries.sum(-1)
    if spec.clip == "entry":
        clipped_N, is_clipped_N = (
            entries.clamp(max=spec.clip_threshold).sum(-1),
            (entries > spec.clip_threshold).any(-1),
        )
    elif spec.clip == "token":
        clipped_N, is_clipped_N = unclipped_N.clamp(max=spec.clip_threshold), unclipped_N > spec.clip_threshold
    else:
        clipped_N, is_clipped_N = unclipped_N, torch.zeros_like(unclipped_N, dtype=torch.bool)
    return Divergence(
        total=clipped_N.sum(),
        count=clipped_N.numel(),
        clipped_N=clipped_N.detach(),
        unclipped_N=unclipped_N.detach(),
        is_clipped_N=is_clipped_N,
        student_entropy_N=-(student_NV.exp() * student_NV).sum(-1).detach(),
        teacher_entropy_N=-(teacher_NV.exp() * teacher_NV).sum(-1),
        teacher_top_N=teacher_NV.argmax(-1),
    )


def chunked_divergence(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    spec: DivergenceSpec,
    sampled_N: Tensor | None = None,
    contrast_hidden_NH: Tensor | None = None,
) -> Divergence:
    """The same divergence from hidden states, a chunk of tokens at a time.

    The gradients to the student's hidden states, and to its head if it is trained, are computed chunk by chunk in the
    forward pass, so the backward pass projects nothing again. That takes three products of C x V x H with a frozen
    head (student, teacher, gradient), and four with a trained one. With zero tokens the total is a zero that is still
    part of the graph, so that every rank can run backward.

    Args:
        student_hidden_NH, teacher_hidden_NH: The states that predict the N tokens; their widths may differ.
        student_head, teacher_head: Over the same vocabulary.
        spec: The divergence to compute.
        sampled_N: The sampled tokens, for `sampled_log_p_N`.
        contrast_hidden_NH: The states of the teacher that sees another prompt's rubric, if `spec.contrast` is above 0.

    Raises:
        ConfigError: If the token counts or the vocabularies differ, or the contrast's states are missing.
    """
    _check_contrast(spec, contrast_hidden_NH)
    if contrast_hidden_NH is not None and contrast_hidden_NH.shape != teacher_hidden_NH.shape:
        raise ConfigError(
            f"got teacher states of shape {tuple(teacher_hidden_NH.shape)} and states of its contrast of shape "
            f"{tuple(contrast_hidden_NH.shape)}: both must come from the same model, one per token"
        )
    if student_hidden_NH.size(0) != teacher_hidden_NH.size(0):
        raise ConfigError(
            f"got {student_hidden_NH.size(0)} student and {teacher_hidden_NH.size(0)} teacher hidden states: expected "
            "one of each per token"
        )
    if student_head.weight_VH.size(0) != teacher_head.weight_VH.size(0):
        raise ConfigError(
            f"the student's vocabulary has {student_head.weight_VH.size(0)} entries, the teacher's "
            f"{teacher_head.weight_VH.size(0)}: they must be the same"
        )
    # Cast once here and switch autocast off: it would cast the head once per chunk, and sum over the vocabulary in half
    # precision.
    kind = student_hidden_NH.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        student_hidden_NH, teacher_hidden_NH = student_hidden_NH.to(low), teacher_hidden_NH.to(low)
        contrast_hidden_NH = None if contrast_hidden_NH is None else contrast_hidden_NH.to(low)
        student_head, teacher_head = student_head.to(low), teacher_head.to(low)
    with torch.autocast(kind, enabled=False):
        total, *details = _ChunkedDivergence.apply(  # pyright: ignore[reportGeneralTypeIssues]
            student_hidden_NH,
            student_head.weight_VH,
            student_head.bias_V,
            student_head,
            teacher_hidden_NH,
            teacher_head,
            spec,
            sampled_N,
            contrast_hidden_NH,
        )
    return Divergence(total, student_hidden_NH.size(0), *details)


def _check_contrast(spec: DivergenceSpec, contrast: Tensor | None) -> None:
    if (contrast is None) == (spec.contrast > 0):
        got = "none was given" if contrast is None else "one was given"
        raise ConfigError(
            f"a contrast of {spec.contrast} {'needs' if spec.contrast else 'takes no'} second teacher, but {got}: give "
            "both, or neither"
        )


def _teacher_logits(head: Head, hidden_CH: Tensor, contrast_hidden_CH: Tensor | None, contrast: float) -> Tensor:
    """(C, V) logits of the teacher, contrastive if there are states of its contrast."""
    logits_CV = head.logits(hidden_CH)
    if contrast_hidden_CH is None:
        return logits_CV
    # In place in the contrast's logits: (1 + contrast) z_right - contrast z_contrast.
    return head.logits(contrast_hidden_CH).lerp_(logits_CV, 1.0 + contrast)


def _at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _with_tail(log_p_NV: Tensor, top_NK: Tensor) -> Tensor:
    """(N, K + 1): the log-probabilities of K tokens, and of all others together."""
    log_tail_N1 = log_p_NV.scatter(-1, top_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_NV.gather(-1, top_NK), log_tail_N1], dim=-1)


class _ChunkedDivergence(torch.autograd.Function):
    """The chunked loss. The forward pass also computes the gradients, and the backward pass only scales them.

    That is possible because the loss is a sum over tokens: its gradient is known up to one scalar before backward runs.
    Autograd would instead keep every chunk's logits, or project all of them a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        teacher_hidden_NH: Tensor,
        teacher_head: Head,
        spec: DivergenceSpec,
        sampled_N: Tensor | None,
        contrast_hidden_NH: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        count, vocabulary = hidden_NH.size(0), weight_VH.size(0)
        exact = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        per_token = {"dtype": exact, "device": hidden_NH.device}
        clipped_N, unclipped_N, student_entropy_N, teacher_entropy_N = (
            torch.zeros(count, **per_token) for _ in range(4)
        )
        is_clipped_N = torch.zeros(count, dtype=torch.bool, device=hidden_NH.device)
        teacher_top_N = torch.zeros(count, dtype=torch.long, device=hidden_NH.device)
        sampled_log_p_N = None if sampled_N is None else torch.zeros(count, **per_token)
        grad_hidden_NH = torch.zeros_like(hidden_NH) if need_hidden else None
        # In full precision, since these are sums over all chunks.
        grad_weight_VH = torch.zeros(weight_VH.shape, **per_token) if need_weight else None
        grad_bias_V = torch.zeros(vocabulary, **per_token) if need_bias else None

        held = CPU_CHUNK_ELEMENTS if hidden_NH.device.type == "cpu" else CHUNK_ELEMENTS
        chunk = spec.chunk_tokens or max(1, held // vocabulary)
        with_grad = any(ctx.needs_input_grad)
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            contrast_CH = None if contrast_hidden_NH is None else contrast_hidden_NH[rows]
            logits_CV = head.logits(hidden_NH[rows])
            teacher_logits_CV = _teacher_logits(teacher_head, teacher_hidden_NH[rows], contrast_CH, spec.contrast)
            for block in _blocks(logits_CV):
                result = _chunk(logits_CV[block], teacher_logits_CV[block], spec, with_grad)
                at = slice(start + block.start, start + block.stop)
                clipped_N[at], unclipped_N[at], is_clipped_N[at] = result.clipped, result.unclipped, result.is_clipped
                student_entropy_N[at], teacher_entropy_N[at] = result.student_entropy, result.teacher_entropy
                teacher_top_N[at] = result.teacher_top
                if sampled_N is not None and sampled_log_p_N is not None:
                    sampled_log_p_N[at] = result.student_log_p.gather(-1, sampled_N[at, None])[:, 0]
                if result.grad_logits is not None:
                    # This block's logits are no longer needed: their gradient takes their place.
                    logits_CV[block] = _through_head(result.grad_logits, logits_CV[block], head)
            if not with_grad:
                continue
            grad_CV = logits_CV
            low_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = linear(low_CV, weight_VH.T)
            if grad_weight_VH is not None:
                grad_weight_VH += low_CV.T @ hidden_NH[rows].to(low_CV.dtype)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)

        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        details = (clipped_N, unclipped_N, is_clipped_N, student_entropy_N, teacher_entropy_N, teacher_top_N)
        ctx.mark_non_differentiable(*details)
        if sampled_log_p_N is not None:
            ctx.mark_non_differentiable(*details, sampled_log_p_N)
        return clipped_N.sum(), *details, sampled_log_p_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_total: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        # The stored gradients are of the sum; only the factor that divides it (the global count) comes from outside.
        scaled = [
            None if grad is None else (grad * grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


@dataclass(slots=True)
class _Chunk:
    """The values of a chunk's tokens, and the gradient of their sum to the student's logits (after the soft cap)."""

    clipped: Tensor
    unclipped: Tensor
    is_clipped: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    teacher_top: Tensor
    student_log_p: Tensor
    grad_logits: Tensor | None


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """The rows of a chunk to process at once: on a CPU what fits its cache, elsewhere all, to launch fewer kernels."""
    count, vocabulary = logits_CV.shape
    block = max(1, BLOCK_ELEMENTS // vocabulary) if logits_CV.device.type == "cpu" else count
    return (slice(start, min(start + block, count)) for start in range(0, count, block))


def _through_head(grad_CV: Tensor, logits_CV: Tensor, head: Head) -> Tensor:
    """The gradient to h W' + b, from the gradient to the logits after scale and soft cap."""
    if head.softcap is not None:
        grad_CV = grad_CV * (1 - (logits_CV / head.softcap) ** 2)  # tanh' = 1 - tanh^2
    return grad_CV if head.scale == 1.0 else grad_CV * head.scale


def _chunk(student_logits_CV: Tensor, teacher_logits_CV: Tensor, spec: DivergenceSpec, with_grad: bool) -> _Chunk:
    is_warped = spec.temperature != 1.0
    if is_warped:
        student_logits_CV, teacher_logits_CV = (
            student_logits_CV / spec.temperature,
            teacher_logits_CV / spec.temperature,
        )
    student_CV, teacher_CV = F.log_softmax(student_logits_CV, dim=-1), F.log_softmax(teacher_logits_CV, dim=-1)
    p_student_CV, p_teacher_CV = student_logits_CV.softmax(-1), teacher_logits_CV.softmax(-1)
    student_entropy, teacher_entropy = -_dot(p_student_CV, student_CV), -_dot(p_teacher_CV, teacher_CV)
    teacher_top = _most_likely(teacher_logits_CV)

    if spec.top_k is not None and spec.top_k < student_CV.size(-1):
        top_CK = teacher_CV.topk(spec.top_k, dim=-1).indices
        student, teacher = _with_tail(student_CV, top_CK), _with_tail(teacher_CV, top_CK)
        entries, grad_log_p = _entries(student, teacher, student.exp(), teacher.exp(), spec.beta)
    else:
        top_CK, student = None, student_CV
        entries, grad_log_p = _entries(student_CV, teacher_CV, p_student_CV, p_teacher_CV, spec.beta)

    unclipped = entries.sum(-1)
    if spec.clip == "entry":
        is_clipped = entries.amax(-1) > spec.clip_threshold
        grad_log_p = _zero_above(spec.clip_threshold, entries, grad_log_p)
        clipped = entries.clamp_(max=spec.clip_threshold).sum(-1)
    elif spec.clip == "token":
        clipped, is_clipped = unclipped.clamp(max=spec.clip_threshold), unclipped > spec.clip_threshold
        grad_log_p.masked_fill_(is_clipped[:, None], 0.0)
    else:
        clipped, is_clipped = unclipped, torch.zeros_like(unclipped, dtype=torch.bool)

    grad = None
    if with_grad:
        # d log p_v / d z_u = [u = v] - p_u. For the bucket of all others, [u = v] becomes p_u / p_bucket.
        grad_sum = grad_log_p.sum(-1, keepdim=True)
        if top_CK is None:
            grad = grad_log_p.addcmul_(p_student_CV, grad_sum, value=-1.0)
        else:
            # In the log domain: the bucket's probability may underflow although the shares in it do not.
            grad = (
                (student_CV - student[:, -1:]).exp_().mul_(grad_log_p[:, -1:]).scatter_(-1, top_CK, grad_log_p[:, :-1])
            )
            grad.addcmul_(p_student_CV, grad_sum, value=-1.0)
        if is_warped:
            grad /= spec.temperature
    return _Chunk(clipped, unclipped, is_clipped, student_entropy, teacher_entropy, teacher_top, student_CV, grad)


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """The inner product of each row. On an accelerator, einsum avoids holding the (C, V) product."""
    return (a_CV * b_CV).sum(-1) if a_CV.device.type == "cpu" else torch.einsum("cv,cv->c", a_CV, b_CV)


def _most_likely(logits_CV: Tensor) -> Tensor:
    """Like `argmax(-1)`, which on a CPU is ten times slower than `amax`: so first find the block with the maximum.

    Of equal maxima it returns the first, as `argmax` does.
    """
    count, vocabulary = logits_CV.shape
    if logits_CV.device.type != "cpu" or vocabulary % ARGMAX_BLOCK:
        return logits_CV.argmax(-1)
    blocks = logits_CV.unflatten(-1, (-1, ARGMAX_BLOCK))
    block_C = blocks.amax(-1).argmax(-1)
    return block_C * ARGMAX_BLOCK + blocks[torch.arange(count), block_C].argmax(-1)


def _zero_above(threshold: float, entries: Tensor, grad: Tensor) -> Tensor:
    """The gradient where the entry is at most the threshold, else 0.

    hardtanh's backward is a `masked_fill` without the mask, in one vectorized pass. It excludes its upper bound, hence
    the next greater number.
    """
    least_above = torch.nextafter(torch.tensor(threshold, dtype=entries.dtype), torch.tensor(math.inf)).item()
    return torch.ops.aten.hardtanh_backward(grad, entries, -math.inf, least_above)


def _entries(
    student: Tensor, teacher: Tensor, p_student: Tensor, p_teacher: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The terms l of the divergence, and dl / d log p_S of each.

    Args:
        student, teacher: Log-probabilities.
        p_student, p_teacher: The same as probabilities.
        beta: As in `DivergenceSpec`.

    Returns:
        Two new tensors, which the caller may overwrite.
    """
    if beta == 0.0:
        return p_teacher * (teacher - student), -p_teacher
    if beta == 1.0:
        entries = p_student * (student - teacher)
        return entries, entries + p_student
    # If both probabilities underflow, the entry is below 1e-36 for any log m. The clamp keeps it finite.
    log_m = torch.add(beta * p_teacher, p_student, alpha=1.0 - beta).clamp_(min=torch.finfo(student.dtype).tiny).log_()
    # The derivative of l to p_S is (1 - beta) log(p_S / m): the terms through m cancel.
    grad_log_p = (student - log_m).mul_(p_student).mul_(1.0 - beta)
    entries = torch.sub(teacher, log_m, out=log_m).mul_(p_teacher).mul_(beta).add_(grad_log_p)
    return entries, grad_log_p
