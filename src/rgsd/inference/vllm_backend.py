"""Generation with vLLM in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError, ModelError
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
from rgsd.prompts.thinking import prompt_opens_thinking


def vllm_settings(sampling: SamplingConfig, *, dtype: str, engine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a response of vLLM depends on besides weights and prompt."""
    return {"backend": "vllm", "dtype": dtype, "engine": dict(engine or {}), **sampling.identity()}


class VllmGenerator:
    """Generates with vLLM in this process, through `LLM.chat`. Needs the extra `vllm` and a device that vLLM supports.

    Written against vLLM's public interface (`LLM`, `LLM.chat`, `SamplingParams`, `RequestOutput`) and tested with a
    stand-in for it, not with vLLM itself.

    vLLM returns nothing until a whole call is done, so prompts go in `batch_size` at a time: a larger batch is faster,
    a smaller one loses less when the process is killed.

    Args:
        model: A hub id, or a folder that `rgsd export` wrote.
        sampling: The sampling settings. Samples differ from those of `TransformersGenerator`.
        batch_size: Prompts per call, all of which vLLM may have in flight.
        revision: Revision of a hub model.
        weights: The model's identity, for `keys`. None uses its name and revision.
        dtype: As vLLM names it. "auto" loads float32 weights in half precision; pass "float32" to keep them.
        engine: More arguments for vLLM's `LLM`, e.g. {"tensor_parallel_size": 2, "max_model_len": 16384}.

    Raises:
        ConfigError: If vLLM is not installed, or a setting is out of range.
        ModelError: If vLLM cannot load the model or gives up on a prompt.
        PromptTooLong: From `generate`, before anything is generated.
    """

    def __init__(
        self,
        model: str,
        sampling: SamplingConfig,
        *,
        batch_size: int = 256,
        revision: str | None = None,
        dtype: str = "auto",
        engine: Mapping[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        check_batch_size(batch_size)
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"backend `vllm` needs vLLM, which cannot be imported ({error}): pip install 'rgsd[vllm]' on a machine "
                "that it supports, or use --backend transformers, or --backend server with a server elsewhere"
            ) from error
        self._vllm: Any = vllm
        options: dict[str, Any] = {"dtype": dtype, "seed": sampling.seed or 0, **(engine or {})}
        if revision is not None and not Path(model).exists():
            options["revision"] = revision
        try:
            self._llm: Any = self._vllm.LLM(model=model, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ModelError(
                f"vLLM cannot load {model!r}: {reason}. Pass a hub id or a folder with config.json and safetensors "
                "(`rgsd export RUN --output_dir FOLDER` writes one), on a device with enough memory"
            ) from error
        self._tokenizer: Any = self._llm.get_tokenizer()
        self.sampling, self.batch_size = sampling, batch_size
        self.name = f"vllm:{model}"
        self._weights = weights or f"{model}@{revision}"
        self._dtype = dtype
        self._engine = dict(engine or {})

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`. `done` is called batch by batch."""
        lengths = [len(p) for p in tokenize(self._tokenizer, prompts, self.sampling.chat_template_kwargs, self.name)]
        # All prompts are checked before the first batch is generated.
        limit = self._llm.llm_engine.model_config.max_model_len
        check_lengths(lengths, limit, self.sampling.max_new_tokens, prompts, self.name)
        responses: list[Response] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            outputs = self._llm.chat(
                [[dict(m) for m in p] for p in batch],
                sampling_params=[self._params(p) for p in batch],
                use_tqdm=False,
                chat_template_kwargs=self.sampling.chat_template_kwargs or None,
            )
            for i, output in enumerate(outputs, start):
                responses.append(self._response(output, described(i, prompts)))
                if done is not None:
                    done(i, responses[i])
        return responses

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`."""
        settings = vllm_settings(self.sampling, dtype=self._dtype, engine=self._engine)
        sent = tokenize(self._tokenizer, prompts, self.sampling.chat_template_kwargs, self.name)
        return response_keys(self._weights, settings, sent, self.sampling.temperature)

    def _params(self, prompt: Conversation) -> Any:
        # vLLM takes whatever is unset from the checkpoint's generation_config, so every setting is passed.
        s = self.sampling
        return self._vllm.SamplingParams(
            temperature=s.temperature or 0.0,
            top_p=s.top_p,
            max_tokens=s.max_new_tokens,
            seed=prompt_seed(s.seed, prompt),
            detokenize=False,
            **s.filters,
        )

    def _response(self, output: Any, prompt: str) -> Response:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise ModelError(
                f"vLLM ended {prompt} with {completion.finish_reason!r}, expected stop or length: run the same command "
                "again"
            )
        ids = list(completion.token_ids)
        if completion.finish_reason == "stop":
            ids = ids[:-1]  # the end of sequence: no other stop was requested
        starts_in_thinking = prompt_opens_thinking(
            output.prompt_token_ids, self._tokenizer, self.sampling.think_tags[0]
        )
        text = decode(self._tokenizer, ids, self.sampling.think_tags)
        return Response(text, len(ids), completion.finish_reason == "length", starts_in_thinking)
