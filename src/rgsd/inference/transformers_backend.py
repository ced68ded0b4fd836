"""Generation with a transformers model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rgsd.errors import ModelError
from rgsd.inference.interface import (
    Conversation,
    Done,
    Response,
    ResponseKey,
    check_batch_size,
    check_lengths,
    decode,
    described,
    prompt_seed,
    response_keys,
    tokenize,
)
from rgsd.inference.sampling import SamplingConfig
from rgsd.progress import counting, say
from rgsd.prompts.thinking import prompt_opens_thinking

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rgsd.models.kernels.sampling import Sampling

# Shapes: B prompts in a batch, T tokens, V vocabulary entries.


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    *,
    batch_size: int = 32,
    label: str = "responses",
) -> list[Response]:
    """Responses of a `TransformersGenerator`, in the order of the prompts. `label` names the progress bar."""
    generator = TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size)
    with counting(label, len(prompts)) as counter:
        return generator.generate(prompts, lambda i, response: counter.advance())


def transformers_settings(sampling: SamplingConfig, *, dtype: str, attention: str | None) -> dict[str, Any]:
    """What a response depends on besides weights and prompt.

    The batch size is not part of it, because it has no effect in float32.
    """
    return {
        "backend": "transformers",
        "dtype": dtype.removeprefix("torch."),
        "attention": attention,
        **sampling.identity(),
    }


class TransformersGenerator:
    """Generates with a transformers model in this process.

    On a CPU, the decode loop of `rgsd.models.kernels` runs `batch_size` prompts at once and starts the next prompt as
    soon as one ends. For models that it does not cover, and on other devices, prompts of similar length are padded on
    the left and go through transformers' `generate`.

    In float32 a greedy response does not depend on its batch. In bfloat16, rounding can flip a token.

    Args:
        model: On its device. Its mode (training or evaluation) is restored after generation.
        tokenizer: With a chat template.
        sampling: The sampling settings. `temperature` must be a number.
        batch_size: Prompts generated at once. Halved when the device runs out of memory, and kept there.
        weights: The model's identity, for `keys`. None computes a digest of all weights when it is needed.

    Raises:
        ConfigError: If a setting is out of range.
        PromptTooLong: From `generate`, before anything is generated.
        ModelError: From `generate`, if a single prompt does not fit into memory, the template refuses a prompt, or the
            model's logits are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        *,
        batch_size: int = 32,
        weights: str | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.batch_size = sampling, batch_size
        self.weights = weights
        self.name = f"transformers:{getattr(model.config, '_name_or_path', '') or type(model).__name__}"

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`. `done` is called as each response ends, or batch by batch on a device."""
        ids = self.check(prompts)
        responses: dict[int, Response] = {}

        def finish(i: int, row: list[int]) -> None:
            responses[i] = self._response(row, ids[i])
            if done is not None:
                done(i, responses[i])

        from rgsd.models import nonfinite_parameter
        from rgsd.models.kernels.sampling import NonFiniteLogits

        seeds = [prompt_seed(self.sampling.seed, p) for p in prompts]
        was_training = self.model.training
        self.model.eval()
        try:
            if not self._decode(ids, seeds, finish):
                self._in_batches(ids, seeds, finish, prompts)
        except NonFiniteLogits as error:
            parameter = nonfinite_parameter(self.model)
            raise ModelError(
                f"{self.name} gives logits that are not finite; "
                + (f"its parameter {parameter} holds NaN or infinite values" if parameter else "its weights are finite")
                + ". Restore the weights, or load the model as bfloat16 or float32 (--dtype)"
            ) from error
        finally:
            self.model.train(was_training)
        return [responses[i] for i in range(len(ids))]

    def check(self, prompts: Sequence[Conversation]) -> list[list[int]]:
        """The prompts as token ids, after checking that each leaves room for the longest response.

        Raises:
            PromptTooLong: For a prompt that does not.
            ModelError: If the template refuses a prompt.
        """
        ids = tokenize(self.tokenizer, prompts, self.sampling.chat_template_kwargs, self.name)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        check_lengths([len(p) for p in ids], limit, self.sampling.max_new_tokens, prompts, self.name)
        return ids

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`."""
        from rgsd.models import weights_digest

        settings = transformers_settings(
            self.sampling,
            dtype=str(self.model.dtype),
            attention=getattr(self.model.config, "_attn_implementation", None),
        )
        sent = tokenize(self.tokenizer, prompts, self.sampling.chat_template_kwargs, self.name)
        return response_keys(self.weights or weights_digest(self.model), settings, sent, self.sampling.temperature)

    def _decode(self, ids: Sequence[list[int]], seeds: Sequence[int], finish: Callable[[int, list[int]], None]) -> bool:
        """Generate with the CPU decode loop of `rgsd.models.kernels`. Returns False if it does not cover this case."""
        from rgsd.models.kernels import decoding

        # The loop has no repetition penalty.
        if self.sampling.repetition_penalty != 1.0 or not decoding.covers(self.model):
            return False
        settings = decoding.DecodingSettings(self._kernel_sampling(), tuple(self._ends()), self.sampling.max_new_tokens)
        rows = max(1, min(self.batch_size, len(ids)))
        with decoding.ready(self.model, rows):
            decoding.decode(self.model, ids, settings, rows=rows, draws=lambda i: self._draws(seeds[i]), done=finish)
        return True

    def _kernel_sampling(self) -> Sampling:
        from rgsd.models.kernels.sampling import Sampling

        s = self.sampling
        return Sampling(s.temperature or 0.0, s.top_p, s.top_k, s.min_p)

    def _draws(self, seed: int) -> torch.Tensor:
        """A prompt's random draws, one per token."""
        import torch

        return torch.rand(
            self.sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

    def _in_batches(
        self,
        ids: Sequence[list[int]],
        seeds: Sequence[int],
        finish: Callable[[int, list[int]], None],
        prompts: Sequence[Conversation],
    ) -> None:
        """Generate with transformers' `generate`, batch by batch. Out of memory, the batch is halved."""
        import torch

        # Similar lengths share a batch, so that little is padded.
        remaining = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while remaining:
            batch = remaining[: self.batch_size]
            problem, rows = "", []
            try:
                rows = self._rows([ids[i] for i in batch], [seeds[i] for i in batch])
            except torch.OutOfMemoryError as error:
                problem = str(error).splitlines()[0]
            if problem:  # outside the handler: its traceback would keep the memory allocated
                self._halve(len(batch), problem, described(batch[0], prompts))
                continue
            for i, row in zip(batch, rows, strict=True):
                finish(i, row)
            remaining = remaining[len(batch) :]

    def _halve(self, n: int, problem: str, prompt: str) -> None:
        import torch

        if n == 1:
            raise ModelError(
                f"the device runs out of memory for {prompt} alone ({problem}): lower max_new_tokens, load the model "
                "as bfloat16, use a device with more memory, or choose --backend server or vllm"
            )
        self.batch_size = n // 2
        say(f"  out of memory with {n} prompts at once: continuing with {self.batch_size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rows(self, ids: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        """The new tokens of each prompt, including padding after their end."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

        ends = self._ends()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0]
        width = max(len(p) for p in ids)
        # Padded on the left, so that all prompts end in the same column.
        input_ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in ids], device=self.model.device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids], device=self.model.device)
        # First, so that NaN is reported rather than sampled.
        processors = LogitsProcessorList([_finite])  # pyright: ignore[reportArgumentType]
        if self.sampling.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(self.sampling.repetition_penalty))
        if not self.sampling.is_greedy:
            # The processor samples and leaves one token, so `generate` itself decodes greedily.
            draws_BT = torch.stack([self._draws(s) for s in seeds])
            processors.append(_SeededSampling(draws_BT, width, self._kernel_sampling()))  # pyright: ignore
        plain = GenerationConfig(
            do_sample=False, max_new_tokens=self.sampling.max_new_tokens, eos_token_id=ends or None, pad_token_id=pad
        )
        with torch.no_grad(), own_generation_config(self.model, plain):
            out = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=input_ids_BT, attention_mask=mask_BT, generation_config=plain, logits_processor=processors
            )
        return out[:, width:].tolist()

    def _ends(self) -> list[int]:
        """The tokens that end a response: from the tokenizer and from the checkpoint's generation_config."""
        from_config: Any = self.model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id, *(from_config if isinstance(from_config, list) else [from_config])]
        return list(dict.fromkeys(e for e in ends if e is not None))

    def _response(self, row: list[int], prompt_ids: list[int]) -> Response:
        ends = set(self._ends())
        end = next((k for k, token in enumerate(row) if token in ends), None)
        tokens = row if end is None else row[:end]
        starts_in_thinking = prompt_opens_thinking(prompt_ids, self.tokenizer, self.sampling.think_tags[0])
        text = decode(self.tokenizer, tokens, self.sampling.think_tags)
        return Response(text, len(tokens), end is None, starts_in_thinking)


@contextmanager
def own_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation config, from which transformers would fill fields that ours leaves unset."""
    # A PeftModel and the model inside it both have one.
    owners = [m for m in model.modules() if "generation_config" in vars(m)]
    originals = [m.generation_config for m in owners]
    for m in owners:
        m.generation_config = config
    try:
        yield
    finally:
        for m, original in zip(owners, originals, strict=True):
            m.generation_config = original


def _finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that refuses NaN, which `argmax` would take for the most likely token."""
    from rgsd.models.kernels.sampling import check_logits

    check_logits(scores)
    return scores


class _SeededSampling:
    """Masks all next tokens of a row except the one that the row's own draw picks, so its batch has no influence.

    Args:
        draws_BT: Uniform draws from 0 to 1, one per row and step.
        prompt_length: Width of the padded prompts, in tokens.
        sampling: The sampling settings.
    """

    def __init__(self, draws_BT: torch.Tensor, prompt_length: int, sampling: Sampling) -> None:
        self.draws_BT, self.prompt_length, self.sampling = draws_BT, prompt_length, sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        from rgsd.models.kernels.sampling import pick

        draws_B = self.draws_BT[:, input_ids.size(1) - self.prompt_length]
        picked_B = pick(scores, draws_B, self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B[:, None], 0.0)
