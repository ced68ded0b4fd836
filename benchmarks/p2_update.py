"""P2: the update phase against its matrix products alone, in the same process.

    update      teacher forward, student forward and backward, divergence: SmolLM2-135M, LoRA r = 16, float32
    divergence  from the hidden states of student and teacher to loss and gradient

The shapes of the products are recorded from one update on torch's plain path; attention counts as its products over the
full square. Each product then runs as often as it occurred, with `torch.mm` or `torch.bmm`, into preallocated memory.
The products of the divergence (student, teacher, gradient) cover all tokens at once.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common, p1_step
from rgsd.training.loss import DivergenceSpec, Head, chunked_divergence
from rgsd.training.trainer import Rollout


def run(quick: bool) -> dict[str, Any]:
    n, rounds = (4, 1) if quick else (8, 4)
    wanted = common.lengths(n, median=24 if quick else 56, most=48 if quick else 160)
    trainer = p1_step.rgsd_trainer(common.rows(n), wanted)[0]
    trainer.create_optimizer()
    trainer.model.train()
    rows = list(trainer.train_dataset)
    students = trainer._tokenize_messages([r["prompt"] for r in rows])
    teachers = trainer._tokenize_messages([r["teacher_prompt"] for r in rows])
    g = torch.Generator().manual_seed(0)
    responses = [torch.randint(100, 40000, (k,), generator=g).tolist() for k in wanted]

    def update() -> None:
        rollouts = [Rollout(s, t, r, [True] * len(r)) for s, t, r in zip(students, teachers, responses, strict=True)]
        (batch,) = trainer._micro_batches(rollouts, groups=1)
        trainer.compute_loss(trainer.model, batch).backward()
        trainer.model.zero_grad()

    with plain_path():
        update()
        recorder = Recorder()
        with recorder:
            update()
    timed = common.alternate({"update": update, "products": recorder.replay()}, rounds=rounds)

    spec, vocabulary, width, count = DivergenceSpec(0.5, "entry"), 49152, 576, sum(wanted)
    weight = torch.randn(vocabulary, width, generator=g) * 0.05
    student, teacher = (torch.randn(count, width, generator=g) for _ in range(2))
    student.requires_grad_()

    def divergence() -> None:
        student.grad = None
        chunked_divergence(student, Head(weight), teacher, Head(weight), spec).total.backward()

    products = Recorder()
    products.seen[("mm", (count, width, vocabulary))] = 2
    products.seen[("mm", (count, vocabulary, width))] = 1
    alone = common.alternate({"divergence": divergence, "products": products.replay()}, rounds=2 * rounds)
    return {
        "setting": {"rows": n, "response_tokens": count, "teacher_tokens": sum(map(len, teachers)) + count},
        "seconds": {"update": timed, "divergence": alone},
        "update/products": common.ratios(timed, "update", "products"),
        "divergence/products": common.ratios(alone, "divergence", "products"),
        "target": "update/products at most 1.5, divergence/products at most 1.3",
    }


@contextmanager
def plain_path() -> Any:
    os.environ["RGSD_FAST"] = "0"
    try:
        yield
    finally:
        del os.environ["RGSD_FAST"]


class Recorder(TorchDispatchMode):
    """The shapes of every product: ("mm", (M, K, N)) or ("bmm", (B, M, K, N)), and how often each occurred."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.seen["mm", (a.size(0), a.size(1), b.size(1))] += 1
        elif name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            backward = name.endswith("backward")
            query, key = args[1:3] if backward else args[:2]
            count = query.size(0) * query.size(1)
            # Forward: scores, and values. Backward: scores again, and the gradients of values, weights, query, key.
            self.seen["bmm", (count, query.size(2), query.size(3), key.size(2))] += 3 if backward else 1
            self.seen["bmm", (count, query.size(2), key.size(2), query.size(3))] += 2 if backward else 1
        return func(*args, **(kwargs or {}))

    def replay(self) -> Any:
        """A function that multiplies all of them, bare."""
        pool = torch.randn(max(max(_sizes(kind, shape)) for kind, shape in self.seen))
        out = torch.empty_like(pool)
        jobs = []
        for (kind, shape), times in self.seen.items():
            a, b, c = _sizes(kind, shape)
            *batch, m, k, n = shape
            operands = pool[:a].view(*batch, m, k), pool[:b].view(*batch, k, n), out[:c].view(*batch, m, n)
            jobs.append((torch.bmm if batch else torch.mm, *operands, times))

        def products() -> None:
            with torch.no_grad():
                for multiply, x, y, into, times in jobs:
                    for _ in range(times):
                        multiply(x, y, out=into)

        return products


def _sizes(kind: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    batch = shape[0] if kind == "bmm" else 1
    m, k, n = shape[-3:]
    return batch * m * k, batch * k * n, batch * m * n
