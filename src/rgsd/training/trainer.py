"""RGSDTrainer: Rubric-Guided Self-Distillation on TRL's DistillationTrainer.

One optimizer step (arXiv 2606.12507, section 3):

    _prepare_inputs        rollouts: TRL samples one response a prompt from the student
                           think-mask, and the one global count of tokens in the loss
                           teacher: (prompt + rubric, response) -> hidden states of the tokens in the loss
    compute_loss           student: (prompt, response) -> hidden states -> chunked divergence -> sum / count
    (TRL, transformers)    backward, optimizer

Rollout and teacher run once a step, over all of its rows; the student runs a micro-batch at a time. Each cuts its own
rows by length. Letters in names: B rows, T tokens, N tokens in the loss, H hidden width.
"""

# What TRL and transformers leave untyped, or type too loosely to subclass:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIncompatibleMethodOverride=false
# pyright: reportCallIssue=false

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import ProcessorMixin, TrainerCallback
from trl import DistillationTrainer

from rgsd.errors import ConfigError, ModelError, PromptTooLong
from rgsd.inference import own_generation_config
from rgsd.models import adapters, check_finite
from rgsd.models.batching import pad_right, partition, predicting_positions, slices
from rgsd.models.kernels import decoding
from rgsd.models.kernels.linears import frozen
from rgsd.models.sharding import whole
from rgsd.progress import say
from rgsd.prompts.leaks import mentions_rubric
from rgsd.prompts.thinking import prompt_opens_thinking, response_mask
from rgsd.training.checkpoints import CheckpointMixin
from rgsd.training.config import RGSDConfig, sampling_notes
from rgsd.training.loss import Head, chunked_divergence
from rgsd.training.teacher import Teacher

TEACHER_FILE = "teacher.safetensors"
"""The teacher's moving average, inside a checkpoint."""

HEAD_TOLERANCE, HEAD_TOLERANCE_LOW = 1e-3, 0.04
"""How far head(hidden states) may be from the model's own logits, as a share of the greatest: rounding in float32, and
in half precision (a few times its epsilon)."""
N_CHECKED_TOKENS = 16
"""Tokens of the row on which this is checked."""

N_NAMED = 5
"""How many examples an error names; it counts all of them."""


@dataclass(slots=True)
class Rollout:
    """One prompt, as both policies read it, and the student's response to it."""

    student_prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]
    in_loss: list[bool]
    example_id: str = "?"
    teacher_hidden_NH: Tensor | None = None
    sampler_log_p: list[float] | None = None


class RGSDTrainer(CheckpointMixin, DistillationTrainer):
    """Post-trains a policy on rubrics by distilling it, shown the rubric, into itself, shown the prompt alone.

    Args:
        model: a model id, a folder, or a loaded (Peft)Model. It is both the student and the teacher.
        args: an `RGSDConfig`.
        train_dataset: rows with `prompt` and `teacher_prompt` (chat messages, see
        `rgsd.prompts.messages.training_rows`) and,
            for error messages, `example_id`; or a sequence of `Example`, whose teacher prompts are made as `args` say.
        eval_dataset: the same, for the divergence on held-out prompts.
        processing_class: the tokenizer; loaded from the model's name when omitted.
        peft_config: a LoRA configuration; the adapter is the student, the network without it the teacher.
        other arguments: TRL's.

    Raises:
        ConfigError: when the settings, the data or the machine contradict each other.
        PromptTooLong: when a student's or teacher's prompt exceeds its limit, naming the examples. Nothing is cut.
    """

    _tag_names: ClassVar = ["trl", "rgsd"]
    _name = "RGSD"
    _paper: ClassVar = {
        "title": "Rubric-Guided Self-Distillation: Post-Training Without Rubric Verifiers",
        "id": "2606.12507",
        "citation": "",
    }

    args: RGSDConfig

    def __init__(
        self,
        model: Any,
        args: RGSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RGSDConfig(output_dir=f"{str(name).rstrip('/').split('/')[-1]}-RGSD")
        if isinstance(processing_class, ProcessorMixin):
            raise ConfigError("RGSD trains on text: pass the processor's tokenizer as processing_class")
        if "lm_head" in (getattr(peft_config, "target_modules", None) or ()):
            raise ConfigError(
                "target_modules name lm_head, but an adapter on the head would get no gradient: the loss reads the "
                "head's own weight. Leave it out, or train the whole head with modules_to_save (lora_modules_to_save)"
            )
        self._sampler_log_ps: list[list[float]] | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=_as_rows(train_dataset, args),
            eval_dataset=_as_rows(eval_dataset, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._check_machine()
        self._check_prompts(self.train_dataset)
        self._check_prompts(self.eval_dataset)
        self._check_head()
        if self.is_world_process_zero():
            for note in sampling_notes(args, self.accelerator.unwrap_model(self.model).generation_config):
                say(note)
        self._spec = args.divergence_spec()
        student = self.accelerator.unwrap_model(self.model)
        self.teacher = Teacher(student, args.teacher_model_kind, args.teacher_update_rate)
        if self._dist.is_zero3 and self.teacher.is_swapped:
            raise ConfigError(
                "a teacher that is a copy of trained parameters (full training, or teacher_model_kind 'ema') "
                "does not work "
                "under DeepSpeed ZeRO-3, whose parameters cannot be swapped in place: use LoRA (use_peft) with "
                "teacher_model_kind 'base', FSDP2, or ZeRO-2"
            )
        self._teacher_head: Head | None = None
        self._base_weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor | float] = {}
        self._most_apart = 0.0
        self._seconds: dict[str, float] = {}
        self._example_ids: list[str] = []
        self.add_callback(_StepEnd(self))

    # --- Checks before anything runs ----------------------------------------------------------------------------

    def _check_machine(self) -> None:
        args, rows = self.args, self.train_dataset
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        if rows is not None and hasattr(rows, "__len__") and len(rows) < per_step:
            raise ConfigError(
                f"a step takes {per_step} prompts (per_device_train_batch_size x gradient_accumulation_steps x "
                f"processes), the training set has {len(rows)}: lower one of the former, or add prompts"
            )

    def _check_prompts(self, rows: Any) -> None:
        """Refuse prompts that the model or the settings have no room for, all at once, before training."""
        if rows is None or not hasattr(rows, "__len__"):
            return
        for name, limit in (("prompt", self.args.max_prompt_length), ("teacher_prompt", self.args.max_teacher_length)):
            room = self._room_for_prompt() if limit is None else limit
            if room is None:
                continue
            column = rows[name]
            ids = rows["example_id"] if "example_id" in rows.column_names else list(range(len(column)))
            lengths = [len(t) for t in self._tokenize_messages(list(column))]
            long = [(i, n) for i, n in zip(ids, lengths, strict=True) if n > room]
            if long:
                named = ", ".join(f"{i} ({n:,} tokens)" for i, n in long[:N_NAMED])
                setting = "max_prompt_length" if name == "prompt" else "max_teacher_length"
                whose = "student" if name == "prompt" else "teacher"
                raise PromptTooLong(
                    f"{len(long)} {whose} prompts are longer than the limit of {room:,} tokens: {named}"
                    f"{', ...' if len(long) > N_NAMED else ''}. Prompts are never cut: "
                    + (
                        "lower max_completion_length or leave these examples out, since the model has no more positions"
                        if limit is None
                        else f"raise {setting}, or leave these examples out"
                    )
                )

    def _check_head(self) -> None:
        """Refuse a model whose logits are not what the loss makes of its hidden states: on one short row, by the first
        process, where it has all weights and can run them."""
        student = self.accelerator.unwrap_model(self.model)
        is_elsewhere = any(p.is_meta or p.device.type != self.accelerator.device.type for p in student.parameters())
        if self.args.process_index != 0:
            return
        if self._dist.is_zero3 or is_elsewhere:
            say("The head is not checked against the model's own logits: this process does not hold the weights yet")
            return
        ids = self._tokenizer.encode("What helps with a cough?", add_special_tokens=False)[:N_CHECKED_TOKENS]
        ids_BT = torch.tensor([ids or [self._tokenizer.eos_token_id]], device=self.accelerator.device)
        every_BT = torch.ones_like(ids_BT)
        batch = {"input_ids": ids_BT, "attention_mask": every_BT, "predicting_BT": every_BT.bool()}
        was_training = student.training
        student.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                raw_NV = student(input_ids=ids_BT, attention_mask=every_BT, use_cache=False).logits[0]
                hidden_NH = self._hidden(student, batch)
                head_NV = _head(student).logits(hidden_NH)
        finally:
            student.train(was_training)
        own_NV = raw_NV.float()
        if not bool(torch.isfinite(own_NV.amax(-1)).all()):
            check_finite(student, self.model.config._name_or_path)
            raise ModelError(
                f"the logits of {self.model.config._name_or_path!r} are not finite, although its weights are: load it "
                "in bfloat16 or float32"
            )
        tolerance = HEAD_TOLERANCE if raw_NV.dtype == head_NV.dtype == hidden_NH.dtype else HEAD_TOLERANCE_LOW
        apart_NV = torch.where(own_NV == head_NV, 0.0, (own_NV - head_NV).abs())
        if float(apart_NV.max()) > tolerance * float(own_NV.abs().max()):
            worst = int(apart_NV.argmax())
            network = student.get_base_model() if isinstance(student, PeftModel) else student
            raise ModelError(
                f"the model's own logit of a token is {float(own_NV.flatten()[worst]):.6g}, but its head gives "
                f"{float(head_NV.flatten()[worst]):.6g} for the same hidden state: {type(network).__name__} does "
                "more in its forward pass than apply the head (and the scale or soft cap that its config names), so "
                "the loss would be another model's. RGSD does not support this architecture"
            )

    def _room_for_prompt(self) -> int | None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - (self.max_completion_length or 0)

    def _tokenize_messages(self, prompts: list[Any]) -> list[list[int]]:
        return self._tokenize_prompts(prompts)[0] if prompts else []

    # --- Rollouts -----------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            return self._micro_batches(self._rollouts(generation_batch), groups=1)[0]
        groups = self.args.gradient_accumulation_steps
        if self._step % groups == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._micro_batches(self._rollouts(generation_batch), groups)
        return self._buffered_inputs[self._step % groups]

    def _rollouts(self, rows: Sequence[Mapping[str, Any]]) -> list[Rollout]:
        """Sample a response to each row's prompt, and decide which of its tokens are in the loss."""
        with self._timed("rollout"):
            prompt_ids, responses, *_ = self._generate([row["prompt"] for row in rows])
        teacher_ids = self._tokenize_messages([row["teacher_prompt"] for row in rows])
        rollouts = [
            Rollout(list(p), list(t), list(r), self._in_loss(p, r), str(row.get("example_id", "?")))
            for row, p, t, r in zip(rows, prompt_ids, teacher_ids, responses, strict=True)
        ]
        for rollout, log_p in zip(rollouts, self._sampler_log_ps or (), strict=self._sampler_log_ps is not None):
            # Not where an end was added to a response that an engine returned without one.
            rollout.sampler_log_p = log_p if len(log_p) == len(rollout.response) else None
        self._note_rollouts(rows, rollouts)
        return rollouts

    def _in_loss(self, prompt: list[int], response: list[int]) -> list[bool]:
        args = self.args
        if not args.mask_thinking:
            return [True] * len(response)
        return response_mask(
            response,
            self._tokenizer,
            open_tag=args.think_open_tag,
            close_tag=args.think_close_tag,
            starts_in_thinking=prompt_opens_thinking(prompt, self._tokenizer, args.think_open_tag),
        )

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ):
        student = self.accelerator.unwrap_model(self.model)
        was_training = student.training
        student.eval()  # dropout has no place in a rollout
        self._sampler_log_ps = None
        try:
            with own_generation_config(student, self.generation_config):
                responses = None if self.use_vllm or multimodal_fields else self._decoded(student, prompt_ids)
                if responses is None:
                    with self._merged(student), self._noting_engine():
                        responses = super()._generate_single_turn(
                            prompt_ids, images, multimodal_fields, has_tool_images
                        )
        finally:
            student.train(was_training)
        # An engine may leave the end of sequence out; a response of nothing else would be no response at all.
        return [list(ids) or [self._tokenizer.eos_token_id] for ids in responses]

    def _decoded(self, student: nn.Module, prompt_ids: Sequence[list[int]]) -> list[list[int]] | None:
        """Rollouts by the decode loop of `rgsd.models.kernels`, in the precision of the student's own forward
        pass; None where it
        does not apply. In float32 it merges LoRA into copies of the weights; in half precision, never."""
        if not (self.args.merge_lora_for_rollouts and self._mergeable(student)):
            return None
        with self.accelerator.autocast():
            log_ps: dict[int, list[float]] = {}
            found = decoding.generate(student, prompt_ids, self.generation_config, log_ps.__setitem__)
        is_scored = found is not None and len(log_ps) == len(found)
        if found is not None and is_scored and self.generation_config.do_sample:
            self._sampler_log_ps = [log_ps[i] for i in range(len(found))]
        return found

    @contextmanager
    def _noting_engine(self) -> Iterator[None]:
        """Keep the log-probabilities that vLLM returns with its tokens, which TRL asks it for and throws away."""
        engine = self.vllm_generation if self.use_vllm else None
        if engine is None:
            yield
            return
        of_trl, asked = engine.generate, engine.logprobs

        def generate(*args: Any, **kwargs: Any) -> Any:
            out = of_trl(*args, **kwargs)
            if out[2] is not None:
                # One a token; None, where vLLM's was NaN, becomes NaN again, and is left out of the means.
                self._sampler_log_ps = [[math.nan if t[0] is None else t[0] for t in row] for row in out[2]]
            return out

        engine.generate, engine.logprobs = generate, 0
        try:
            yield
        finally:
            del engine.generate
            engine.logprobs = asked

    @contextmanager
    def _merged(self, student: nn.Module) -> Iterator[None]:
        """LoRA merged while transformers samples, a fifth faster, where the base weights are float32. Merged into half
        precision, most of a small update would be lost, and the rollouts would come from another policy than the
        student. (vLLM gets copies: see `checkpoints.CheckpointMixin`.)"""
        wanted = self.args.merge_lora_for_rollouts and not self.use_vllm and isinstance(student, PeftModel)
        if not (wanted and self._mergeable(student) and adapters.merges_exactly(student)):
            yield
            return
        with self._base_weights_kept(student):
            student.merge_adapter()
            try:
                yield
            finally:
                student.unmerge_adapter()

    @contextmanager
    def _base_weights_kept(self, student: nn.Module) -> Iterator[None]:
        """Frozen base weights put back bit for bit after a merge: unmerging subtracts, so that they, and with them the
        teacher, would drift by a rounding error a step. The copy is in the host's memory, made once."""
        if not self._base_weights:
            self._base_weights = {n: w.to("cpu", copy=True) for n, w in _merged_into(student)}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in _merged_into(student):
                    weight.copy_(self._base_weights[name])

    def _mergeable(self, student: nn.Module) -> bool:
        return not (adapters.is_quantized(student) or self.is_deepspeed_enabled or self.is_fsdp_enabled)

    # --- Micro-batches and the teacher --------------------------------------------------------------------------

    def _micro_batches(self, rollouts: list[Rollout], groups: int) -> list[dict[str, Any]]:
        """The student's micro-batches, each with the teacher's hidden states of its tokens."""
        self._run_teacher(rollouts, groups)
        local = torch.tensor(sum(sum(r.in_loss) for r in rollouts), device=self.accelerator.device)
        count = self.accelerator.gather(local).sum()
        lengths = [len(r.student_prompt) + len(r.response) for r in rollouts]
        batches = []
        for group in partition(lengths, groups):
            rows = [rollouts[i] for i in group]
            batch = self._batch(rows, [r.student_prompt for r in rows])
            batch["teacher_hidden_NH"] = torch.cat([r.teacher_hidden_NH for r in rows])
            sampled = [t for r in rows for t, keep in zip(r.response, r.in_loss, strict=True) if keep]
            batch["sampled_N"] = torch.tensor(sampled, dtype=torch.long, device=self.accelerator.device)
            log_ps = [p for r in rows for p, keep in zip(_log_p_of(r), r.in_loss, strict=True) if keep]
            batch["sampler_log_p_N"] = torch.tensor(log_ps, dtype=torch.float32, device=self.accelerator.device)
            batch["num_items_in_batch"] = count
            batch["example_ids"] = [r.example_id for r in rows]
            batches.append(batch)
        return batches

    def _batch(self, rows: Sequence[Rollout], prompts: Sequence[list[int]]) -> dict[str, Any]:
        sequences = [p + r.response for p, r in zip(prompts, rows, strict=True)]
        padded = pad_right(sequences, self._tokenizer.pad_token_id)
        positions = predicting_positions([len(p) for p in prompts], [r.in_loss for r in rows], padded.ids_BT.size(1))
        device = self.accelerator.device
        return {
            "input_ids": padded.ids_BT.to(device),
            "attention_mask": padded.mask_BT.to(device),
            "predicting_BT": positions.to(device),
        }

    def _run_teacher(self, rollouts: list[Rollout], groups: int) -> None:
        """Each rollout's teacher states: one pass over all rows of the step, cut by the teacher's own lengths."""
        student = self.accelerator.unwrap_model(self.model)
        lengths = [len(r.teacher_prompt) + len(r.response) for r in rollouts]
        own = student.get_output_embeddings().weight
        with self._timed("teacher"), self.teacher.active(), self.accelerator.autocast(), frozen(student):
            layer = student.get_output_embeddings()
            weight, bias = layer.weight, layer.bias
            for group in partition(lengths, groups):
                rows = [rollouts[i] for i in group]
                batch = self._batch(rows, [r.teacher_prompt for r in rows])
                hidden_NH = self._forward_redirection(self.model_wrapped, student, self._teacher_states, student, batch)
                for row, states in zip(rows, hidden_NH.split([sum(r.in_loss) for r in rows]), strict=True):
                    row.teacher_hidden_NH = states
        # A trained head has another value in the teacher than in the student. Where they are one, and cut among
        # processes, the student's own pass gathers it.
        is_gathered_anyway = isinstance(weight, DTensor) and weight is own and not self.teacher.has_copy_of(weight)
        self._teacher_head = (
            None if is_gathered_anyway else _head(student, self.teacher.value_of(weight), self.teacher.value_of(bias))
        )

    def _teacher_states(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        layer = student.get_output_embeddings()
        # FSDP2 ends its forward pass when the last module of a group has run, and the head is in a group.
        return self._forward_redirection(layer, layer, lambda hidden_NH: hidden_NH, self._hidden(student, batch))

    def _hidden(self, unwrapped: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(N, H): the final hidden states that predict the tokens in the loss, row by row."""
        network = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # all processes must run as many passes
        states = []
        kind = batch["input_ids"].device.type
        for rows in [slice(None)] if sharded else slices(batch["attention_mask"].sum(-1).tolist(), kind):
            mask_BT = batch["attention_mask"][rows]
            longest = mask_BT.size(1) if sharded else int(mask_BT.sum(-1).max())
            output = network.base_model(
                input_ids=batch["input_ids"][rows, :longest], attention_mask=mask_BT[:, :longest], use_cache=False
            )
            states.append(output.last_hidden_state[batch["predicting_BT"][rows, :longest]])
        return torch.cat(states)

    # --- Loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        student = self.accelerator.unwrap_model(model)
        self._example_ids = inputs["example_ids"]
        # The redirection runs past the forward pass that accelerate wrapped, and so past its autocast.
        with self.accelerator.autocast(), frozen(student):
            loss = self._forward_redirection(model, student, self._divergence_loss, student, inputs)
        self._check_before_backward(loss, self._example_ids)
        if not self.model.training:
            self._flush("eval")
        return (loss, {}) if return_outputs else loss

    def _examples_of(self, inputs: Any) -> list[str]:
        return self._example_ids

    def _divergence_loss(self, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        hidden_NH, layer = self._hidden(student, inputs), student.get_output_embeddings()
        # Through the head's own forward, which is where FSDP2 and DeepSpeed gather its weight.
        return self._forward_redirection(layer, layer, self._divergence_of, hidden_NH, student, inputs)

    def _divergence_of(self, hidden_NH: Tensor, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        head = _head(student)
        teacher_head = head if self._teacher_head is None else self._teacher_head
        sampled_N = inputs["sampled_N"]
        result = chunked_divergence(hidden_NH, head, inputs["teacher_hidden_NH"], teacher_head, self._spec, sampled_N)
        self._note_loss(result, sampled_N, inputs["sampler_log_p_N"])
        # DDP and FSDP average over processes; the count is already global.
        return result.total * self.accelerator.num_processes / inputs["num_items_in_batch"].clamp(min=1)

    # --- Resume -------------------------------------------------------------------------------------------------

    def _save_extra(self, folder: Path) -> None:
        state = self.teacher.state_dict()
        if state and self.args.should_save:
            save_file({n: t.contiguous().cpu() for n, t in state.items()}, folder / TEACHER_FILE)

    def _load_extra(self, folder: Path) -> None:
        if self.args.teacher_model_kind != "ema":
            return
        path = folder / TEACHER_FILE
        if not path.is_file():
            raise ModelError(
                f"{folder} has no {TEACHER_FILE}: it was not saved with teacher_model_kind 'ema'. "
                "Resume with the teacher_model_kind that the run had"
            )
        self.teacher.load_state_dict(load_file(path))

    # --- What is logged -----------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        _wait_for_device()
        start = time.perf_counter()
        yield
        _wait_for_device()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        before = self._seconds.get("rollout", 0.0) + self._seconds.get("teacher", 0.0)
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        spent = time.perf_counter() - start
        inner = self._seconds.get("rollout", 0.0) + self._seconds.get("teacher", 0.0) - before
        self._seconds["student"] = self._seconds.get("student", 0.0) + spent - inner
        self._seconds["student_done"] = time.perf_counter()
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # What an evaluation takes is no part of the next step's seconds and sums.
        kept = self._seconds, self._sums, self._most_apart
        self._seconds, self._sums, self._most_apart = {}, {}, 0.0
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._seconds, self._sums, self._most_apart = kept

    def _add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _note_rollouts(self, rows: Sequence[Mapping[str, Any]], rollouts: Sequence[Rollout]) -> None:
        # The reasoning is not part of what a reader sees.
        answers = [[t for t, keep in zip(r.response, r.in_loss, strict=True) if keep] for r in rollouts]
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        leaks = 0
        for row, text in zip(rows, texts, strict=True):
            prompt = row["prompt"]
            question = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
            leaks += mentions_rubric(text, question)
        tokens = sum(len(r.response) for r in rollouts)
        self._add(
            rows=len(rollouts),
            leaks=leaks,
            response_tokens=tokens,
            read_tokens=sum(2 * len(r.response) + len(r.student_prompt) + len(r.teacher_prompt) for r in rollouts),
            masked_tokens=tokens - sum(sum(r.in_loss) for r in rollouts),
            truncated=sum(not r.response or r.response[-1] not in self.eos_token_ids for r in rollouts),
        )

    def _note_loss(self, result: Any, sampled_N: Tensor, sampler_log_p_N: Tensor) -> None:
        apart_N = (result.sampled_log_p_N - sampler_log_p_N).abs()
        apart_N = apart_N[apart_N.isfinite()]
        self._add(scored=apart_N.numel(), log_p_apart=apart_N.sum())
        if apart_N.numel():
            self._most_apart = max(self._most_apart, float(apart_N.max()))
        self._add(
            tokens=float(result.count),
            clipped=result.clipped_N.sum(),
            unclipped=result.unclipped_N.sum(),
            is_clipped=result.is_clipped_N.sum(),
            student_entropy=result.student_entropy_N.sum(),
            teacher_entropy=result.teacher_entropy_N.sum(),
            agreement=(result.teacher_top_N == sampled_N).sum(),
        )

    def _flush(self, mode: str, seconds: Mapping[str, float] | None = None) -> None:
        """One step's sums, over all processes, into the log's means."""
        names = sorted(self._sums)
        local = torch.tensor([float(self._sums[n]) for n in names], dtype=torch.float64).to(
            torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        )
        total = self.accelerator.gather(local.to(self.accelerator.device)[None]).sum(0)
        s = dict(zip(names, total.tolist(), strict=True))
        most_apart = self.accelerator.gather(local.new_tensor([self._most_apart]).to(self.accelerator.device)).max()
        self._sums, self._most_apart = {}, 0.0
        tokens, rows = max(s.get("tokens", 0), 1), max(s.get("rows", 0), 1)
        values = {
            "divergence": s.get("unclipped", 0) / tokens,
            "clipped_divergence": s.get("clipped", 0) / tokens,
            "clipped_share": s.get("is_clipped", 0) / tokens,
            "masked_share": s.get("masked_tokens", 0) / max(s.get("response_tokens", 0), 1),
            "student_entropy": s.get("student_entropy", 0) / tokens,
            "teacher_entropy": s.get("teacher_entropy", 0) / tokens,
            "agreement": s.get("agreement", 0) / tokens,
            "response_length": s.get("response_tokens", 0) / rows,
            "truncated_share": s.get("truncated", 0) / rows,
            "leak_rate": s.get("leaks", 0) / rows,
        }
        if s.get("scored"):
            # TRL's names in its GRPOTrainer.
            values["sampling/sampling_logp_difference/mean"] = s["log_p_apart"] / s["scored"]
            values["sampling/sampling_logp_difference/max"] = float(most_apart)
        if seconds:
            values |= {f"seconds/{phase}": value for phase, value in seconds.items()}
            values["tokens_per_second"] = s.get("read_tokens", 0) / max(sum(seconds.values()), 1e-9)
        for name, value in values.items():
            self._metrics[mode][name].append(value)

    def _end_of_step(self) -> None:
        self.teacher.update()
        _wait_for_device()
        done = self._seconds.pop("student_done", None)
        seconds = {phase: self._seconds.get(phase, 0.0) for phase in ("rollout", "teacher", "student")}
        seconds["update"] = 0.0 if done is None else time.perf_counter() - done
        self._seconds = {}
        self._flush("train", seconds)


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: RGSDTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_of_step()


def _as_rows(data: Any, args: RGSDConfig) -> Any:
    """A dataset with `prompt` and `teacher_prompt`; examples get their teacher prompts made here."""
    from datasets import Dataset, IterableDataset  # heavy, and only needed here

    from rgsd.prompts.messages import training_rows
    from rgsd.rubrics import Example

    if data is None:
        return None
    if isinstance(data, Sequence) and data and all(isinstance(e, Example) for e in data):
        return Dataset.from_list(training_rows(list(data), args.prompt_settings()))
    if isinstance(data, Dataset | IterableDataset):
        columns = data.column_names
        if columns is None or {"prompt", "teacher_prompt"} <= set(columns):
            return data
        raise ConfigError(
            f"the dataset has the columns {sorted(columns)}; 'prompt' and 'teacher_prompt' (chat messages) are wanted. "
            "Make them with rgsd.prompts.messages.training_rows, or pass the Examples that rgsd.data.load returns"
        )
    raise ConfigError(
        f"train_dataset and eval_dataset must be a datasets.Dataset with 'prompt' and 'teacher_prompt', or a non-empty "
        f"sequence of rgsd Examples; got {type(data).__name__}"
    )


def _merged_into(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights that a merge changes. Trained ones (LoRA's `bias="all"`) belong to the optimizer."""
    for name, layer in adapters.layers(model):
        for own, parameter in layer.get_base_layer().named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield f"{name}.{own}", parameter.detach()


def _log_p_of(rollout: Rollout) -> list[float]:
    """The sampler's log-probability of each response token; NaN where it gave none."""
    return rollout.sampler_log_p or [math.nan] * len(rollout.response)


def _head(student: nn.Module, weight: Tensor | None = None, bias: Tensor | None = None) -> Head:
    """The student's head, or one with other values, with the logit post-processing read as TRL reads it."""
    if weight is None:
        layer = student.get_output_embeddings()
        weight, bias = layer.weight, layer.bias
    config = student.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(whole(weight), None if bias is None else whole(bias), _logit_scale(config), softcap)


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide; HyperCLOVA X multiplies
    if divisor is None:
        return 1.0
    return divisor if config.model_type == "hyperclovax" else 1.0 / divisor


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
