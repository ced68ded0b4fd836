"""A model of transformers in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rgsd.errors import ModelError
from rgsd.inference.interface import (
    Conversation,
    Done,
    Response,
    ResponseKey,
    check_lengths,
    check_settings,
    decode,
    described,
    prompt_seed,
    response_keys,
    tokenize,
)
from rgsd.progress import counting, say
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, prompt_opens_thinking

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rgsd.models.kernels.sampling import Sampling

# Shapes: B prompts of a batch, T tokens, V words of the vocabulary.


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str = "responses",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    think_open_tag: str = OPEN_TAG,
    think_close_tag: str = CLOSE_TAG,
) -> list[Response]:
    """Greedy responses in the prompts' order, by `TransformersGenerator`, with the progress shown under `label`."""
    generator = TransformersGenerator(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
        think_open_tag=think_open_tag,
        think_close_tag=think_close_tag,
    )
    with counting(label, len(prompts)) as counter:
        return generator.generate(prompts, lambda i, response: counter.advance())


def transformers_settings(
    max_new_tokens: int, top_p: float, seed: int, tags: tuple[str, str], *, dtype: str, attention: str | None
) -> dict[str, Any]:
    """What a response of a model of transformers depends on besides weights and prompt. Not the batch's size, which in
    float32 changes nothing."""
    return {
        "backend": "transformers",
        "max_new_tokens": max_new_tokens,
        "top_p": top_p,
        "seed": seed,
        "tags": tags,
        "dtype": dtype.removeprefix("torch."),
        "attention": attention,
    }


class TransformersGenerator:
    """A model of transformers in this process, in batches of prompts of about one length, padded on the left.

    On a CPU the decode loop of `rgsd.models.kernels` answers where it knows the model, `batch_size` prompts at
    once, the next one
    as soon as one has ended; everywhere else transformers' `generate`.

    In float32, a greedy response is the same in whatever batch it is written; in bfloat16 rounding can tip a token.

    Args:
        model: on the device where it is to run; in training mode or not, it is left as it was.
        tokenizer: with a chat template.
        max_new_tokens: longest response, in tokens.
        batch_size: prompts at once. When the device's memory does not suffice it is halved, and stays so.
        temperature: 0 is greedy.
        top_p: sample from the most likely words that together have this probability; 1: from all.
        seed: of sampling.
        chat_template_kwargs: for the chat template, e.g. {"enable_thinking": False}.
        think_open_tag, think_close_tag: of reasoning; they stay in the text even where they are special tokens.
        weights: identity of the model's weights, for `keys`. None: a digest of all of them, taken when it is asked for.

    Raises:
        ConfigError: for a setting out of range.
        PromptTooLong: from `generate`, before anything is generated.
        ModelError: from `generate`, when memory does not suffice for one prompt alone, the template refuses one, or the
            model's logits are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        think_open_tag: str = OPEN_TAG,
        think_close_tag: str = CLOSE_TAG,
        weights: str | None = None,
    ) -> None:
        from rgsd.models.kernels.sampling import Sampling

        check_settings(max_new_tokens, temperature, top_p, batch_size)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.sampling, self.seed = Sampling(temperature, top_p), seed
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.tags = (think_open_tag, think_close_tag)
        self.weights = weights
        self.name = f"transformers:{getattr(model.config, '_name_or_path', '') or type(model).__name__}"

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`; `done` is called as each response ends, or batch by batch on a device."""
        ids = tokenize(self.tokenizer, prompts, self.chat_template_kwargs, self.name)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        check_lengths([len(p) for p in ids], limit, self.max_new_tokens, prompts, self.name)
        found: dict[int, Response] = {}

        def keep(i: int, row: list[int]) -> None:
            found[i] = self._response(row, ids[i])
            if done is not None:
                done(i, found[i])

        from rgsd.models import nonfinite_parameter
        from rgsd.models.kernels.sampling import NonFiniteLogits

        seeds = [prompt_seed(self.seed, p) for p in prompts]
        was_training = self.model.training
        self.model.eval()
        try:
            if not self._decode(ids, seeds, keep):
                self._in_batches(ids, seeds, keep, prompts)
        except NonFiniteLogits as error:
            parameter = nonfinite_parameter(self.model)
            raise ModelError(
                f"{self.name} gives logits that are not finite; "
                + (f"its parameter {parameter} holds NaN or infinite values" if parameter else "its weights are finite")
                + ". Restore the weights, or load the model as bfloat16 or float32 (--dtype)"
            ) from error
        finally:
            self.model.train(was_training)
        return [found[i] for i in range(len(ids))]

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`."""
        from rgsd.models import weights_digest

        settings = transformers_settings(
            self.max_new_tokens,
            self.sampling.top_p,
            self.seed,
            self.tags,
            dtype=str(self.model.dtype),
            attention=getattr(self.model.config, "_attn_implementation", None),
        )
        sent = tokenize(self.tokenizer, prompts, self.chat_template_kwargs, self.name)
        return response_keys(self.weights or weights_digest(self.model), settings, sent, self.sampling.temperature)

    def _decode(self, ids: Sequence[list[int]], seeds: Sequence[int], keep: Callable[[int, list[int]], None]) -> bool:
        """On a CPU, by the decode loop of `rgsd.models.kernels`; whether that could be done."""
        from rgsd.models.kernels import decoding

        if not decoding.covers(self.model):
            return False
        what = decoding.Plan(self.sampling, tuple(self._ends()), self.max_new_tokens)
        rows = max(1, min(self.batch_size, len(ids)))
        with decoding.ready(self.model, rows):
            decoding.decode(self.model, ids, what, rows=rows, draws=lambda i: self._draws(seeds[i]), done=keep)
        return True

    def _draws(self, seed: int) -> torch.Tensor:
        """A prompt's draws, one a token."""
        import torch

        return torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def _in_batches(
        self,
        ids: Sequence[list[int]],
        seeds: Sequence[int],
        keep: Callable[[int, list[int]], None],
        prompts: Sequence[Conversation],
    ) -> None:
        """By transformers' `generate`, a batch at a time, smaller ones when memory does not suffice."""
        import torch

        left = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while left:
            batch = left[: self.batch_size]
            problem, rows = "", []
            try:
                rows = self._rows([ids[i] for i in batch], [seeds[i] for i in batch])
            except torch.OutOfMemoryError as error:
                problem = str(error).splitlines()[0]
            if problem:  # outside of the handler, whose traceback would keep the memory
                self._halve(len(batch), problem, described(batch[0], prompts))
                continue
            for i, row in zip(batch, rows, strict=True):
                keep(i, row)
            left = left[len(batch) :]

    def _halve(self, n: int, problem: str, prompt: str) -> None:
        import torch

        if n == 1:
            raise ModelError(
                f"the device's memory does not suffice for {prompt} alone ({problem}): lower max_new_tokens, load the "
                "model as bfloat16, or use a device with more memory, or --backend server or vllm"
            )
        self.batch_size = n // 2
        say(f"  out of memory with {n} prompts at once: going on with {self.batch_size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rows(self, ids: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        """The new tokens of each prompt, with whatever follows their end."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        ends = self._ends()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0]
        width = max(len(p) for p in ids)
        input_ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in ids], device=self.model.device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids], device=self.model.device)
        # Sampling is done by the processor, which leaves one token to choose from.
        processors = LogitsProcessorList([_finite])  # pyright: ignore[reportArgumentType]
        if not self.sampling.is_greedy:
            draws_BT = torch.stack([self._draws(s) for s in seeds])
            processors.append(_SeededSampling(draws_BT, width, self.sampling))  # pyright: ignore
        plain = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=ends or None, pad_token_id=pad
        )
        with torch.no_grad(), own_generation_config(self.model, plain):
            out = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=input_ids_BT, attention_mask=mask_BT, generation_config=plain, logits_processor=processors
            )
        return out[:, width:].tolist()

    def _ends(self) -> list[int]:
        """Tokens that end a response: the tokenizer's, and those of the checkpoint's generation_config."""
        of_model: Any = self.model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
        return list(dict.fromkeys(e for e in ends if e is not None))

    def _response(self, row: list[int], prompt_ids: list[int]) -> Response:
        ends = set(self._ends())
        end = next((k for k, token in enumerate(row) if token in ends), None)
        kept = row if end is None else row[:end]
        starts_in_thinking = prompt_opens_thinking(prompt_ids, self.tokenizer, self.tags[0])
        return Response(decode(self.tokenizer, kept, self.tags), len(kept), end is None, starts_in_thinking)


@contextmanager
def own_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put a generation config in the place of the checkpoint's, which transformers would fill the gaps of ours from."""
    owners = [m for m in model.modules() if "generation_config" in vars(m)]
    kept = [m.generation_config for m in owners]
    for m in owners:
        m.generation_config = config
    try:
        yield
    finally:
        for m, was in zip(owners, kept, strict=True):
            m.generation_config = was


def _finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that lets no NaN pass: `argmax` would take it for the likeliest token."""
    from rgsd.models.kernels.sampling import check_logits

    check_logits(scores)
    return scores


class _SeededSampling:
    """Leaves, of a row's next words, the one that its own draw picks: the row's batch has no part in it.

    Args:
        draws_BT: from 0 to 1, one a row and step.
        prompt_length: width of the padded prompts, in tokens.
        how: the settings.
    """

    def __init__(self, draws_BT: torch.Tensor, prompt_length: int, how: Sampling) -> None:
        self.draws_BT, self.prompt_length, self.how = draws_BT, prompt_length, how

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        from rgsd.models.kernels.sampling import pick

        draws_B = self.draws_BT[:, input_ids.size(1) - self.prompt_length]
        picked_B = pick(scores, draws_B, self.how)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B[:, None], 0.0)
