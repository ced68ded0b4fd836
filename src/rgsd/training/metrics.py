"""What `RGSDTrainer` logs for a step: sums over its rows and tokens, and the seconds of its phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rgsd.prompts.leaks import mentions_rubric

if TYPE_CHECKING:
    from rgsd.training.loss import Divergence

PHASES = ("rollout", "teacher", "student")


class StepMetrics:
    """Collects sums and times, and turns them into the means of all processes.

    Sums rather than means, because micro-batches and processes hold different numbers of rows and tokens.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._max_log_p_difference = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._student_done: float | None = None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to a phase."""
        _wait_for_device()
        start = time.perf_counter()
        yield
        _wait_for_device()
        self._seconds[phase] += time.perf_counter() - start

    @contextmanager
    def student_timed(self) -> Iterator[None]:
        """Add the seconds spent inside to the student's phase, less those of a rollout or teacher pass inside."""
        nested_before, start = self._nested_seconds(), time.perf_counter()
        yield
        # No wait for the device here, which would stall every micro-batch: the step ends with one.
        self._seconds["student"] += time.perf_counter() - start - (self._nested_seconds() - nested_before)
        self._student_done = time.perf_counter()

    def _nested_seconds(self) -> float:
        return self._seconds["rollout"] + self._seconds["teacher"]

    def end_step(self) -> dict[str, float]:
        """The seconds of each phase of a step, with what followed the last backward pass as `update`."""
        _wait_for_device()
        update = 0.0 if self._student_done is None else time.perf_counter() - self._student_done
        return {phase: self._seconds[phase] for phase in PHASES} | {"update": update}

    def add_rollouts(
        self, rows: Sequence[Mapping[str, Any]], rollouts: Sequence[Any], tokenizer: Any, eos_token_ids: Sequence[int]
    ) -> None:
        """Count rows, tokens, truncated responses, and responses that mention the rubric.

        Args:
            rows: The rows of the dataset, with `prompt`.
            rollouts: Their `Rollout`s.
            tokenizer: Decodes the responses.
            eos_token_ids: A response that ends in none of them was truncated.
        """
        # Only what a reader of the response sees can leak, so the reasoning is left out.
        answers = [[t for t, keep in zip(r.response, r.in_loss, strict=True) if keep] for r in rollouts]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        leaks = sum(mentions_rubric(text, _text_of(row["prompt"])) for row, text in zip(rows, texts, strict=True))
        response_tokens = sum(len(r.response) for r in rollouts)
        self._add(
            rows=len(rollouts),
            leaks=leaks,
            response_tokens=response_tokens,
            read_tokens=sum(r.n_read for r in rollouts),
            masked_tokens=response_tokens - sum(sum(r.in_loss) for r in rollouts),
            truncated=sum(not r.response or r.response[-1] not in eos_token_ids for r in rollouts),
        )

    def add_loss(self, result: Divergence, sampled_N: Tensor, sampler_log_p_N: Tensor) -> None:
        """Add a micro-batch's divergence.

        Args:
            result: The divergence, with `sampled_log_p_N`.
            sampled_N: The sampled tokens.
            sampler_log_p_N: The sampler's log-probability of each, NaN where it gave none.
        """
        assert result.sampled_log_p_N is not None
        difference_N = (result.sampled_log_p_N - sampler_log_p_N).abs()
        # NaN marks tokens whose sampler reported no log-probability.
        difference_N = difference_N[difference_N.isfinite()]
        if difference_N.numel():
            self._max_log_p_difference = max(self._max_log_p_difference, float(difference_N.max()))
        self._add(
            scored=difference_N.numel(),
            log_p_difference=difference_N.sum(),
            tokens=float(result.count),
            clipped=result.clipped_N.sum(),
            unclipped=result.unclipped_N.sum(),
            is_clipped=result.is_clipped_N.sum(),
            student_entropy=result.student_entropy_N.sum(),
            teacher_entropy=result.teacher_entropy_N.sum(),
            agreement=(result.teacher_top_N == sampled_N).sum(),
        )

    def _add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value

    def averages(self, accelerator: Any, seconds: Mapping[str, float] | None = None) -> dict[str, float]:
        """The step's means over all processes, by the name under which they are logged. Every process must call it.

        Args:
            accelerator: Gathers the sums.
            seconds: Of each phase, from `end_step`; logged too, with the throughput.
        """
        names = sorted(self._sums)
        # float64, since float32 stops counting at 2**24 tokens; Apple's GPUs have no float64.
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        local = torch.tensor([float(self._sums[n]) for n in names], dtype=dtype, device=accelerator.device)
        totals = accelerator.gather(local[None]).sum(0)
        total = defaultdict(float, zip(names, totals.tolist(), strict=True))
        max_difference = accelerator.gather(local.new_tensor([self._max_log_p_difference])).max()
        tokens, rows = max(total["tokens"], 1), max(total["rows"], 1)
        values = {
            "divergence": total["unclipped"] / tokens,
            "clipped_divergence": total["clipped"] / tokens,
            "clipped_share": total["is_clipped"] / tokens,
            "masked_share": total["masked_tokens"] / max(total["response_tokens"], 1),
            "student_entropy": total["student_entropy"] / tokens,
            "teacher_entropy": total["teacher_entropy"] / tokens,
            "agreement": total["agreement"] / tokens,
            "response_length": total["response_tokens"] / rows,
            "truncated_share": total["truncated"] / rows,
            "leak_rate": total["leaks"] / rows,
        }
        if total["scored"]:
            # Named as in TRL's GRPOTrainer.
            values["sampling/sampling_logp_difference/mean"] = total["log_p_difference"] / total["scored"]
            values["sampling/sampling_logp_difference/max"] = float(max_difference)
        if seconds:
            values |= {f"seconds/{phase}": value for phase, value in seconds.items()}
            values["tokens_per_second"] = total["read_tokens"] / max(sum(seconds.values()), 1e-9)
        return values


def _text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _wait_for_device() -> None:
    # CUDA runs asynchronously: without this, a phase's time would count towards whichever phase waits for it.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
