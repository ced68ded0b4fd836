"""vLLM in this process."""

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
    check_lengths,
    check_settings,
    decode,
    described,
    prompt_seed,
    response_keys,
    tokenize,
)
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, prompt_opens_thinking


def vllm_settings(
    max_new_tokens: int,
    top_p: float,
    seed: int,
    tags: tuple[str, str],
    *,
    dtype: str,
    engine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a response of vLLM depends on besides weights and prompt."""
    return {
        "backend": "vllm",
        "max_new_tokens": max_new_tokens,
        "top_p": top_p,
        "seed": seed,
        "tags": tags,
        "dtype": dtype,
        "engine": dict(engine or {}),
    }


class VllmGenerator:
    """vLLM in this process, through its `LLM.chat`. Needs the extra `vllm`, and a device that vLLM supports.

    Written against vLLM's published interface (`LLM`, `LLM.chat`, `SamplingParams`, `RequestOutput`) and tested with a
    stand-in of it: the project's own machines have no such device, so it has not been run on one.

    Prompts go in by `batch_size`, since vLLM gives nothing back before all that it was given are done: larger is
    faster, smaller loses less when killed.

    Args:
        model: a hub id, or a folder that `rgsd export` wrote.
        max_new_tokens, temperature, top_p, seed, chat_template_kwargs, think_open_tag, think_close_tag: as for
            `TransformersGenerator`; sampling differs from its, word for word.
        batch_size: prompts given to vLLM at once, all of which it may have in flight.
        revision: of a hub model.
        weights: identity of the model's weights, for `keys`. None: the name and revision.
        dtype: as vLLM names it; its "auto" turns float32 weights into half precision, so say float32 to keep them.
        engine: more arguments of vLLM's `LLM`, e.g. {"tensor_parallel_size": 2, "max_model_len": 16384}.

    Raises:
        ConfigError: when vLLM is not installed, or for a setting out of range.
        ModelError: when vLLM cannot load the model, or gives up on a prompt.
        PromptTooLong: from `generate`, before anything is generated.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int,
        batch_size: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        think_open_tag: str = OPEN_TAG,
        think_close_tag: str = CLOSE_TAG,
        revision: str | None = None,
        dtype: str = "auto",
        engine: Mapping[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        check_settings(max_new_tokens, temperature, top_p, batch_size)
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"backend `vllm` needs vLLM, which cannot be imported ({error}): pip install 'rgsd[vllm]' on a machine "
                "that it supports, or use --backend transformers, or --backend server with a server elsewhere"
            ) from error
        self._vllm: Any = vllm
        options: dict[str, Any] = {"dtype": dtype, "seed": seed, **(engine or {})}
        if revision is not None and not Path(model).exists():
            options["revision"] = revision
        try:
            self._llm: Any = self._vllm.LLM(model=model, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ModelError(
                f"vLLM cannot load {model!r}: {reason}. Wanted: a hub id or a folder with config.json and safetensors "
                "(`rgsd export RUN FOLDER` writes one from a run), and a device with room for it"
            ) from error
        self._tokenizer: Any = self._llm.get_tokenizer()
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.tags = (think_open_tag, think_close_tag)
        self.name = f"vllm:{model}"
        self._weights = weights or f"{model}@{revision}"
        self._dtype = dtype
        self._more = dict(engine or {})

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`; `done` is called batch by batch."""
        lengths = [len(p) for p in tokenize(self._tokenizer, prompts, self.chat_template_kwargs, self.name)]
        limit = self._llm.llm_engine.model_config.max_model_len
        check_lengths(lengths, limit, self.max_new_tokens, prompts, self.name)
        found: list[Response] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            outputs = self._llm.chat(
                [[dict(m) for m in p] for p in batch],
                sampling_params=[self._params(p) for p in batch],
                use_tqdm=False,
                chat_template_kwargs=self.chat_template_kwargs or None,
            )
            for i, output in enumerate(outputs, start):
                found.append(self._response(output, described(i, prompts)))
                if done is not None:
                    done(i, found[i])
        return found

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`."""
        settings = vllm_settings(
            self.max_new_tokens, self.top_p, self.seed, self.tags, dtype=self._dtype, engine=self._more
        )
        sent = tokenize(self._tokenizer, prompts, self.chat_template_kwargs, self.name)
        return response_keys(self._weights, settings, sent, self.temperature)

    def _params(self, prompt: Conversation) -> Any:
        # Given outright, so that vLLM does not take its defaults from the checkpoint's generation_config.
        return self._vllm.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_new_tokens,
            seed=prompt_seed(self.seed, prompt),
            detokenize=False,
        )

    def _response(self, output: Any, prompt: str) -> Response:
        one = output.outputs[0]
        if one.finish_reason not in ("stop", "length"):
            raise ModelError(
                f"vLLM ended {prompt} with {one.finish_reason!r}, wanted stop or length: run the same command again"
            )
        ids = list(one.token_ids)
        if one.finish_reason == "stop":
            ids = ids[:-1]  # the end of sequence: no other stop was asked for
        starts_in_thinking = prompt_opens_thinking(output.prompt_token_ids, self._tokenizer, self.tags[0])
        return Response(
            decode(self._tokenizer, ids, self.tags), len(ids), one.finish_reason == "length", starts_in_thinking
        )
