"""`RGSDTrainer`: Rubric-Guided Self-Distillation on top of TRL's DistillationTrainer.

One optimizer step (arXiv 2606.12507, section 3):

    _prepare_inputs        rollouts: TRL samples one response per prompt from the student
                           think mask, and the global count of tokens in the loss
                           teacher: (prompt + rubric, response) -> hidden states of the tokens in the loss
    compute_loss           student: (prompt, response) -> hidden states -> chunked divergence -> sum / count
    (TRL, transformers)    backward, optimizer

Rollouts and the teacher run once per step over all of its rows; the student runs once per micro-batch. Student and
teacher each group rows by their own lengths. Letters in names: B rows, T tokens, N tokens in the loss, H hidden width.
"""

# TRL and transformers leave these untyped, or type them too narrowly to subclass:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIncompatibleMethodOverride=false
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from rgsd.inference import Response, own_generation_config
from rgsd.inference.replay import replay
from rgsd.models import adapters
from rgsd.models.batching import pad_right, partition, predicting_positions, slices
from rgsd.models.kernels import decoding
from rgsd.models.kernels.linears import frozen
from rgsd.progress import say
from rgsd.prompts.thinking import prompt_opens_thinking, response_mask
from rgsd.training.config import RGSDConfig, sampling_notes
from rgsd.training.development import Development, DevelopmentMixin
from rgsd.training.heads import check_head, head_of
from rgsd.training.loss import Head, chunked_divergence
from rgsd.training.metrics import StepMetrics
from rgsd.training.teacher import Teacher

TEACHER_FILE = "teacher.safetensors"
"""The file in a checkpoint that holds the teacher's moving average."""

N_CHECKED_TOKENS = 16
"""How many tokens the head is checked on."""

MAX_NAMED = 5
"""How many example ids an error lists at most; it counts all of them."""


@dataclass(slots=True)
class Rollout:
    """One prompt, as the policies read it, and the student's response to it.

    Args:
        student_prompt, teacher_prompt: Token ids.
        response: Token ids, with the end of sequence.
        in_loss: For each response token, whether it is in the loss.
        example_id: For error messages.
        contrast_prompt: Token ids of the teacher prompt with another prompt's rubric, with a contrastive teacher.
        teacher_hidden_NH: The teacher's hidden states that predict the tokens in the loss.
        contrast_hidden_NH: The same after `contrast_prompt`.
        sampler_log_p: The sampler's log-probability of each response token, in nats, where it reported any.
    """

    student_prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]
    in_loss: list[bool]
    example_id: str = "?"
    contrast_prompt: list[int] | None = None
    teacher_hidden_NH: Tensor | None = None
    contrast_hidden_NH: Tensor | None = None
    sampler_log_p: list[float] | None = None

    @property
    def n_read(self) -> int:
        """Tokens that the student and its teachers read."""
        prompts = [self.student_prompt, self.teacher_prompt]
        if self.contrast_prompt is not None:
            prompts.append(self.contrast_prompt)
        return sum(len(p) + len(self.response) for p in prompts)

    def kept(self, per_token: Sequence[Any]) -> list[Any]:
        """The entries of the tokens in the loss."""
        return [value for value, keep in zip(per_token, self.in_loss, strict=True) if keep]


class RGSDTrainer(DevelopmentMixin, DistillationTrainer):
    """Distills a policy that sees the rubric into the same policy without it.

    Args:
        model: A model id, a folder, or a loaded (Peft)Model. It is both student and teacher.
        args: The settings.
        train_dataset: Rows with `prompt` and `teacher_prompt` (chat messages, see
            `rgsd.prompts.messages.training_rows`) and optionally `example_id`, for error messages. Or a sequence of
            `Example`, whose teacher prompts are made according to `args`.
        eval_dataset: The same, to measure the divergence on held-out prompts.
        processing_class: The tokenizer. Loaded by the model's name if omitted.
        callbacks, optimizers, quantization_config: As in TRL.
        peft_config: A LoRA configuration. The adapter is the student, the network without it the teacher.
        development: Scores the student during training, as in `DevelopmentMixin`.

    Raises:
        ConfigError: If the settings contradict each other, the data or the machine.
        PromptTooLong: If a prompt exceeds its limit, naming the examples. Prompts are never truncated.
        ModelError: If the model's logits are not finite, or not what its head makes of its hidden states.
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
        development: Callable[[Any], Development] | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RGSDConfig(output_dir=f"{str(name).rstrip('/').split('/')[-1]}-RGSD")
        if isinstance(processing_class, ProcessorMixin):
            raise ConfigError(
                "processing_class is a processor, but RGSD trains on text: pass the processor's tokenizer"
            )
        if "lm_head" in (getattr(peft_config, "target_modules", None) or ()):
            raise ConfigError(
                "target_modules includes lm_head, but an adapter there would get no gradient: the loss reads the "
                "head's own weight. Remove it, or train the whole head with modules_to_save (lora_modules_to_save)"
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
            development=development,
        )
        self._check_step_size()
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
                "full training and teacher_model_kind 'ema' do not work under DeepSpeed ZeRO-3: the teacher is a copy "
                "of trained parameters, and ZeRO-3's cannot be swapped in place. Use LoRA (use_peft) with "
                "teacher_model_kind 'base', or FSDP2, or ZeRO-2"
            )
        self._teacher_head: Head | None = None
        self._base_weights: dict[str, Tensor] = {}
        self._step_metrics = StepMetrics()
        self._example_ids: list[str] = []
        self.add_callback(_StepEndCallback(self))

    # --- Checks before training ---------------------------------------------------------------------------------

    def _check_step_size(self) -> None:
        args, rows = self.args, self.train_dataset
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        if rows is not None and hasattr(rows, "__len__") and len(rows) < per_step:
            raise ConfigError(
                f"a step takes {per_step} prompts (per_device_train_batch_size x gradient_accumulation_steps x "
                f"processes), but the training set has {len(rows)}: lower one of these settings, or add prompts"
            )

    def _check_prompts(self, rows: Any) -> None:
        """Refuse prompts that are too long, all at once and before training, rather than one by one during it."""
        if rows is None or not hasattr(rows, "__len__"):
            return
        columns = {"prompt": "max_prompt_length", "teacher_prompt": "max_teacher_length"}
        if self.args.teacher_contrast:
            columns["contrast_prompt"] = "max_teacher_length"
        for column_name, setting in columns.items():
            limit = getattr(self.args, setting)
            room = self._room_for_prompt() if limit is None else limit
            if room is None:
                continue
            # Tokenized as TRL does it, so the lengths are those of training.
            prompts = list(rows[column_name])
            ids = rows["example_id"] if "example_id" in rows.column_names else list(range(len(prompts)))
            lengths = [len(tokens) for tokens in self._tokenize_messages(prompts)]
            too_long = [(i, n) for i, n in zip(ids, lengths, strict=True) if n > room]
            if too_long:
                named = ", ".join(f"{i} ({n:,} tokens)" for i, n in too_long[:MAX_NAMED])
                remedy = (
                    "lower max_completion_length, or remove these examples; the model has no more positions"
                    if limit is None
                    else f"raise {setting}, or remove these examples"
                )
                raise PromptTooLong(
                    f"{len(too_long)} {'student' if column_name == 'prompt' else 'teacher'} prompts exceed the limit "
                    f"of {room:,} tokens: {named}{', ...' if len(too_long) > MAX_NAMED else ''}. "
                    f"Prompts are never truncated: {remedy}"
                )

    def _check_head(self) -> None:
        """Check on one short row that the head of the loss gives the model's own logits (`heads.check_head`)."""
        student = self.accelerator.unwrap_model(self.model)
        is_elsewhere = any(p.is_meta or p.device.type != self.accelerator.device.type for p in student.parameters())
        if self.args.process_index != 0:
            return
        if self._dist.is_zero3 or is_elsewhere:
            say("Skipping the check of the model's head: this process does not hold the weights yet")
            return
        ids = self._tokenizer.encode("What helps with a cough?", add_special_tokens=False)[:N_CHECKED_TOKENS]
        ids_BT = torch.tensor([ids or [self._tokenizer.eos_token_id]], device=self.accelerator.device)
        mask_BT = torch.ones_like(ids_BT)
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "predicting_BT": mask_BT.bool()}
        was_training = student.training
        student.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                own_NV = student(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
                hidden_NH = self._hidden(student, batch)
                head_NV = head_of(student).logits(hidden_NH)
        finally:
            student.train(was_training)
        check_head(student, self.model.config._name_or_path, own_NV, hidden_NH, head_NV)

    def _room_for_prompt(self) -> int | None:
        """Positions that the model has left for a prompt, or None if its positions are unlimited."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - (self.max_completion_length or 0)

    def _tokenize_messages(self, prompts: list[Any]) -> list[list[int]]:
        return self._tokenize_prompts(prompts)[0] if prompts else []

    # --- Rollouts -----------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # In evaluation, transformers passes one batch at a time. In training, TRL passes the rows of the whole step to
        # each of its micro-batches: the first makes the rollouts for all.
        if not self.model.training:
            return self._micro_batches(self._rollouts(generation_batch), groups=1)[0]
        groups = self.args.gradient_accumulation_steps
        if self._step % groups == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._micro_batches(self._rollouts(generation_batch), groups)
        return self._buffered_inputs[self._step % groups]

    def _rollouts(self, rows: Sequence[Mapping[str, Any]]) -> list[Rollout]:
        """Sample a response to each prompt, and decide which of its tokens are in the loss."""
        with self._step_metrics.timed("rollout"):
            prompt_ids, responses, *_ = self._generate([row["prompt"] for row in rows])
        teacher_ids = self._tokenize_messages([row["teacher_prompt"] for row in rows])
        contrasts = [row["contrast_prompt"] for row in rows] if self.args.teacher_contrast else []
        contrast_ids = self._tokenize_messages(contrasts) or [None] * len(rows)
        rollouts = [
            Rollout(list(p), list(t), list(r), self._in_loss(p, r), str(row.get("example_id", "?")), c and list(c))
            for row, p, t, c, r in zip(rows, prompt_ids, teacher_ids, contrast_ids, responses, strict=True)
        ]
        for rollout, log_p in zip(rollouts, self._sampler_log_ps or (), strict=self._sampler_log_ps is not None):
            # Lengths differ where an engine returned nothing and an end of sequence was put in its place.
            rollout.sampler_log_p = log_p if len(log_p) == len(rollout.response) else None
        self._step_metrics.add_rollouts(rows, rollouts, self._tokenizer, self.eos_token_ids)
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
        student.eval()  # no dropout in rollouts
        self._sampler_log_ps = None
        try:
            with own_generation_config(student, self.generation_config):
                responses = None if self.use_vllm or multimodal_fields else self._decoded(student, prompt_ids)
                if responses is None:
                    with self._merged(student), self._keeping_engine_log_ps():
                        responses = super()._generate_single_turn(
                            prompt_ids, images, multimodal_fields, has_tool_images
                        )
        finally:
            student.train(was_training)
        # Engines may omit the end of sequence, and a response of nothing else would be empty.
        return [list(ids) or [self._tokenizer.eos_token_id] for ids in responses]

    def _decoded(self, student: nn.Module, prompt_ids: Sequence[list[int]]) -> list[list[int]] | None:
        """Sample with the decode loop of `rgsd.models.kernels`, or return None where it does not apply.

        It reads the weights in the precision of the student's own forward pass. In float32 it merges LoRA into copies
        of the weights; in half precision it never merges.
        """
        if not (self.args.merge_lora_for_rollouts and self._mergeable(student)):
            return None
        log_ps: dict[int, list[float]] = {}
        with self.accelerator.autocast():
            responses = decoding.generate(student, prompt_ids, self.generation_config, log_ps.__setitem__)
        # A greedy token's log-probability says nothing about how far sampling is from the loss.
        if responses is not None and len(log_ps) == len(responses) and self.generation_config.do_sample:
            self._sampler_log_ps = [log_ps[i] for i in range(len(responses))]
        return responses

    @contextmanager
    def _keeping_engine_log_ps(self) -> Iterator[None]:
        """Keep vLLM's log-probabilities of its tokens. TRL's trainer requests them, but drops them."""
        engine = self.vllm_generation if self.use_vllm else None
        if engine is None:
            yield
            return
        trl_generate, trl_logprobs = engine.generate, engine.logprobs

        def generate(*args: Any, **kwargs: Any) -> Any:
            output = trl_generate(*args, **kwargs)
            if output[2] is not None:
                # TRL turns vLLM's NaN into None. It becomes NaN again here, and the means leave it out.
                self._sampler_log_ps = [[math.nan if t[0] is None else t[0] for t in row] for row in output[2]]
            return output

        engine.generate, engine.logprobs = generate, 0  # 0: of the sampled token only
        try:
            yield
        finally:
            del engine.generate  # the class's method shows again
            engine.logprobs = trl_logprobs

    @contextmanager
    def _merged(self, student: nn.Module) -> Iterator[None]:
        """Merge LoRA while transformers samples, which saves a fifth of the time, if the base weights are float32.

        In half precision, rounding would lose most of a small update, and the rollouts would come from a policy other
        than the student. (vLLM gets merged copies: see `CheckpointMixin._send_exact_merges`.)
        """
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
        """Restore the frozen base weights bit for bit on exit. The copy is made once, in host memory.

        Unmerging subtracts what merging added, so the base weights, and with them the teacher, would drift by a
        rounding error per step.
        """
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
        device = self.accelerator.device
        # Of the whole step and all processes: how rows are split over micro-batches then changes no gradient.
        count = self.accelerator.gather(torch.tensor(sum(sum(r.in_loss) for r in rollouts), device=device)).sum()
        lengths = [len(r.student_prompt) + len(r.response) for r in rollouts]
        batches = []
        for group in partition(lengths, groups):
            rows = [rollouts[i] for i in group]
            batch = self._batch(rows, [r.student_prompt for r in rows])
            batch["teacher_hidden_NH"] = torch.cat([r.teacher_hidden_NH for r in rows])
            if self.args.teacher_contrast:
                batch["contrast_hidden_NH"] = torch.cat([r.contrast_hidden_NH for r in rows])
            sampled = [token for r in rows for token in r.kept(r.response)]
            batch["sampled_N"] = torch.tensor(sampled, dtype=torch.long, device=device)
            log_ps = [p for r in rows for p in r.kept(r.sampler_log_p or [math.nan] * len(r.response))]
            batch["sampler_log_p_N"] = torch.tensor(log_ps, dtype=torch.float32, device=device)
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
        """Give each rollout the teacher's hidden states, in one pass per step, grouped by the teacher's own lengths.

        With `teacher_contrast`, a second pass reads the prompts with another prompt's rubric.
        """
        student = self.accelerator.unwrap_model(self.model)
        own = student.get_output_embeddings().weight
        with self._step_metrics.timed("teacher"), self.teacher.active(), self.accelerator.autocast(), frozen(student):
            layer = student.get_output_embeddings()
            weight, bias = layer.weight, layer.bias
            for rollout, states in self._teacher_pass(rollouts, [r.teacher_prompt for r in rollouts], groups):
                rollout.teacher_hidden_NH = states
            if self.args.teacher_contrast:
                contrasts = [r.contrast_prompt or [] for r in rollouts]
                for rollout, states in self._teacher_pass(rollouts, contrasts, groups):
                    rollout.contrast_hidden_NH = states
        # A trained head differs between teacher and student, so the teacher's is kept for the loss. A sharded head that
        # both share is not: the student's own pass gathers it anyway, and another copy would cost its memory.
        is_gathered_anyway = isinstance(weight, DTensor) and weight is own and not self.teacher.has_copy_of(weight)
        self._teacher_head = (
            None if is_gathered_anyway else head_of(student, self.teacher.value_of(weight), self.teacher.value_of(bias))
        )

    def _teacher_pass(
        self, rollouts: list[Rollout], prompts: list[list[int]], groups: int
    ) -> Iterator[tuple[Rollout, Tensor]]:
        """Each rollout with the teacher's hidden states of its tokens in the loss, after its prompt of `prompts`."""
        student = self.accelerator.unwrap_model(self.model)
        lengths = [len(p) + len(r.response) for p, r in zip(prompts, rollouts, strict=True)]
        for group in partition(lengths, groups):
            rows = [rollouts[i] for i in group]
            batch = self._batch(rows, [prompts[i] for i in group])
            hidden_NH = self._forward_redirection(self.model_wrapped, student, self._teacher_states, student, batch)
            yield from zip(rows, hidden_NH.split([sum(r.in_loss) for r in rows]), strict=True)

    def _teacher_states(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        layer = student.get_output_embeddings()
        # FSDP2 ends a group's forward pass when the last module of the group has run. The head is in a group, so it has
        # to run too, although only its input is needed.
        return self._forward_redirection(layer, layer, lambda hidden_NH: hidden_NH, self._hidden(student, batch))

    def _hidden(self, unwrapped: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(N, H): the final hidden states that predict the tokens in the loss, row by row."""
        network = adapters.base_network(unwrapped)
        # Each pass gathers sharded weights, so all processes must run the same number of passes: one.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        kind = batch["input_ids"].device.type
        states = []
        for rows in [slice(None)] if sharded else slices(batch["attention_mask"].sum(-1).tolist(), kind):
            mask_BT = batch["attention_mask"][rows]
            longest = mask_BT.size(1) if sharded else int(mask_BT.sum(-1).max())
            output = network.base_model(
                input_ids=batch["input_ids"][rows, :longest], attention_mask=mask_BT[:, :longest], use_cache=False
            )
            states.append(output.last_hidden_state[batch["predicting_BT"][rows, :longest]])
        return torch.cat(states)

    @torch.no_grad()
    def divergence_on(self, rows: Sequence[Mapping[str, Any]], responses: Sequence[Response]) -> float | None:
        """The divergence between teacher and student on given responses. A process that holds the whole model can call
        it alone. It leaves nothing behind for the next step.

        Args:
            rows: Rows like those of the training set.
            responses: One per row.

        Returns:
            The mean over their tokens in the loss, in nats before the clip; None without such a token.
        """
        names = ("prompt", "teacher_prompt", *(["contrast_prompt"] if self.args.teacher_contrast else []))
        tokenized = [self._tokenize_messages([row[name] for row in rows]) for name in names]
        tags, masks = (self.args.think_open_tag, self.args.think_close_tag), self.args.mask_thinking
        read = [replay(r, self._tokenizer, think_tags=tags, mask_thinking=masks) for r in responses]
        rollouts = [
            Rollout(ids[0], ids[1], r.ids, r.in_loss, contrast_prompt=ids[2] if len(ids) > 2 else None)
            for r, *ids in zip(read, *tokenized, strict=True)
            if any(r.in_loss)
        ]
        if not rollouts:
            return None
        student = self.accelerator.unwrap_model(self.model)
        student.eval()
        total, count = 0.0, 0
        groups = math.ceil(len(rollouts) / self.args.per_device_train_batch_size)
        with self.accelerator.autocast(), frozen(student):
            for group in partition([len(r.teacher_prompt) + len(r.response) for r in rollouts], groups):
                some = sorted((rollouts[i] for i in group), key=lambda r: len(r.student_prompt) + len(r.response))
                student_NH = self._hidden(student, self._batch(some, [r.student_prompt for r in some]))
                with self.teacher.active():
                    layer = student.get_output_embeddings()
                    weight, bias = layer.weight, layer.bias
                    teacher_NH = self._hidden(student, self._batch(some, [r.teacher_prompt for r in some]))
                    contrasts = [r.contrast_prompt for r in some if r.contrast_prompt is not None]
                    contrast_NH = self._hidden(student, self._batch(some, contrasts)) if contrasts else None
                teacher_head = head_of(student, self.teacher.value_of(weight), self.teacher.value_of(bias))
                found = chunked_divergence(
                    student_NH, head_of(student), teacher_NH, teacher_head, self._spec, contrast_hidden_NH=contrast_NH
                )
                total, count = total + float(found.unclipped_N.sum()), count + found.count
        return total / count

    # --- Loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        student = self.accelerator.unwrap_model(model)
        # For the error if this loss is not finite: training_step does not see the examples.
        self._example_ids = inputs["example_ids"]
        # The redirection bypasses the forward pass that accelerate wrapped in autocast.
        with self.accelerator.autocast(), frozen(student):
            loss = self._forward_redirection(model, student, self._divergence_loss, student, inputs)
        self._check_before_backward(loss, self._example_ids)
        if not self.model.training:
            self._log_step("eval")
        return (loss, {}) if return_outputs else loss

    def _examples_of(self, inputs: Any) -> list[str]:
        return self._example_ids

    def _divergence_loss(self, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        hidden_NH, layer = self._hidden(student, inputs), student.get_output_embeddings()
        # FSDP2 and DeepSpeed gather the head's weight in its own forward pass, so the loss runs inside it.
        return self._forward_redirection(layer, layer, self._divergence_of, hidden_NH, student, inputs)

    def _divergence_of(self, hidden_NH: Tensor, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        head = head_of(student)
        teacher_head = head if self._teacher_head is None else self._teacher_head
        sampled_N = inputs["sampled_N"]
        teacher_NH, contrast_NH = inputs["teacher_hidden_NH"], inputs.get("contrast_hidden_NH")
        result = chunked_divergence(hidden_NH, head, teacher_NH, teacher_head, self._spec, sampled_N, contrast_NH)
        self._step_metrics.add_loss(result, sampled_N, inputs["sampler_log_p_N"])
        # DDP and FSDP average gradients over processes, but the count is already global.
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
                f"{folder} has no {TEACHER_FILE}, so it was not saved with teacher_model_kind 'ema': resume with the "
                "run's own teacher_model_kind"
            )
        self.teacher.load_state_dict(load_file(path))

    # --- Metrics ------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch, timed."""
        with self._step_metrics.student_timed():
            return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, with metrics of its own: its time and tokens do not count towards the next training step."""
        of_training, self._step_metrics = self._step_metrics, StepMetrics()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._step_metrics = of_training

    def _log_step(self, mode: str, seconds: Mapping[str, float] | None = None) -> None:
        for name, value in self._step_metrics.averages(self.accelerator, seconds).items():
            self._metrics[mode][name].append(value)
        self._step_metrics = StepMetrics()

    def _end_of_step(self) -> None:
        self.teacher.update()
        self._log_step("train", self._step_metrics.end_step())


class _StepEndCallback(TrainerCallback):
    def __init__(self, trainer: RGSDTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_of_step()


def _as_rows(data: Any, args: RGSDConfig) -> Any:
    """The data as a dataset with `prompt` and `teacher_prompt`; for `Example`s, both are made here."""
    from datasets import Dataset, IterableDataset  # heavy, and only needed here

    from rgsd.prompts.messages import training_rows
    from rgsd.rubrics import Example

    if data is None:
        return None
    if isinstance(data, Sequence) and data and all(isinstance(e, Example) for e in data):
        with_contrast = args.teacher_contrast > 0
        return Dataset.from_list(training_rows(list(data), args.prompt_settings(), with_contrast=with_contrast))
    if isinstance(data, Dataset | IterableDataset):
        columns = data.column_names
        needed = ["prompt", "teacher_prompt", *(["contrast_prompt"] if args.teacher_contrast else [])]
        if columns is None or set(needed) <= set(columns):
            return data
        how = "training_rows(..., with_contrast=True)" if args.teacher_contrast else "training_rows"
        raise ConfigError(
            f"the dataset has the columns {sorted(columns)}, but needs {', '.join(map(repr, needed))} (chat messages): "
            f"make them with rgsd.prompts.messages.{how}, or pass the Examples that rgsd.data.load returns"
        )
    raise ConfigError(
        f"train_dataset and eval_dataset must be a datasets.Dataset with 'prompt' and 'teacher_prompt', or a non-empty "
        f"sequence of rgsd Examples; got {type(data).__name__}"
    )


def _merged_into(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights that a merge changes. Trained ones (LoRA with `bias="all"`) belong to the optimizer."""
    for name, layer in adapters.layers(model):
        for own, parameter in layer.get_base_layer().named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield f"{name}.{own}", parameter.detach()
