"""Policies to evaluate: from a name to its weights, tokenizer and generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rgsd import models
from rgsd.errors import ConfigError
from rgsd.evaluation.config import MeasureConfig
from rgsd.evaluation.run_ref import RunRef
from rgsd.inference import (
    Conversation,
    Done,
    Generator,
    Response,
    ResponseKey,
    ServerGenerator,
    TransformersGenerator,
    VllmGenerator,
    response_keys,
    tokenize,
    transformers_settings,
    vllm_settings,
)
from rgsd.models.lineage import base_of
from rgsd.runs import ADAPTER, MODEL, open_run


class _DeferredGenerator:
    """A generator whose model is loaded when the first response is missing: the stored responses may suffice."""

    def __init__(
        self,
        name: str,
        keys: Callable[[Sequence[Conversation]], list[ResponseKey]],
        build: Callable[[], Generator],
        built: Generator | None = None,
    ) -> None:
        self.name, self._keys, self._build, self._built = name, keys, build, built

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`."""
        return self._keys(prompts)

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`."""
        if self._built is None:
            self._built = self._build()
        return self._built.generate(prompts, done)


def policy_generator(ref: RunRef, settings: MeasureConfig) -> Generator:
    """The generator of a policy. Its keys identify the weights, not the name, which may stand for other weights later.

    The weights are hashed in full for that, but not loaded. Of a server, only the address and the name are known.
    """
    if settings.backend == "server":
        return _generator(ref, settings)
    weights, built = _identity(ref, settings), None
    if weights is None:  # a hub model that is not on this machine yet: loading it downloads it
        built = _generator(ref, settings)
        weights = _identity(ref, settings) or f"hub:{ref.source}@{settings.model_revision}"
    if not ref.is_run and weights.startswith("hub:"):
        # Pin the commit: the branch may move between this hash and the loading.
        settings = dataclasses.replace(settings, model_revision=weights.rpartition("@")[2])
    sampling = settings.sampling()
    if settings.backend == "vllm":
        generation = vllm_settings(sampling, dtype=settings.dtype)
    else:
        generation = transformers_settings(
            sampling, dtype=_dtype(ref, settings), attention=settings.attn_implementation
        )
    tokenizer: list[Any] = []

    def keys(prompts: Sequence[Conversation]) -> list[ResponseKey]:
        if not tokenizer:
            tokenizer.append(load_policy_tokenizer(ref, settings))
        tokens = tokenize(tokenizer[0], prompts, sampling.chat_template_kwargs, ref.source)
        return response_keys(weights, generation, tokens, settings.temperature)

    return _DeferredGenerator(ref.source, keys, lambda: _generator(ref, settings), built)


def _dtype(ref: RunRef, settings: MeasureConfig) -> str:
    """What the weights are loaded in. "auto" is the run's own dtype, and for a model what its files say."""
    if not ref.is_run or settings.dtype != "auto":
        return settings.dtype
    return open_run(ref.source).settings.get("dtype") or "float32"


def _identity(ref: RunRef, settings: MeasureConfig) -> str | None:
    """The identity of a policy's weights; None for a hub model that is not on this machine."""
    if not ref.is_run:
        return models.identity(ref.source, settings.model_revision)
    return models.base_identity(Path(ref.source)) if ref.is_base else models.trained_identity(Path(ref.source))


def _generator(ref: RunRef, settings: MeasureConfig) -> Generator:
    sampling = settings.sampling()
    if settings.backend == "server":
        extra_body: Any = settings.extra_body
        return ServerGenerator(
            ref.source,
            sampling,
            api_base=str(settings.api_base),
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            extra_body=extra_body,
            prompt_opens_thinking=settings.prompt_opens_thinking,
        )
    if settings.backend == "vllm":
        if ref.is_run:
            raise ConfigError(
                f"vLLM loads model folders, but {ref.source} is a run: "
                f"`rgsd export {ref.source} --output_dir FOLDER` writes one"
            )
        return VllmGenerator(ref.source, sampling, revision=settings.model_revision, dtype=settings.dtype)
    model, tokenizer = load_policy(ref, settings)
    return TransformersGenerator(model, tokenizer, sampling, batch_size=settings.batch_size)


def load_policy_tokenizer(ref: RunRef, settings: MeasureConfig) -> Any:
    """The tokenizer of a policy."""
    name, revision = ref.source, settings.model_revision
    if ref.is_run:
        run = open_run(name)
        saved = next((run.folder / d for d in (ADAPTER, MODEL) if (run.folder / d).is_dir()), None)
        if saved is not None and not ref.is_base:
            return models.load_tokenizer(str(saved), trust_remote_code=settings.trust_remote_code)
        name, revision = base_of(run), run.settings.get("model_revision") or "main"
    return models.load_tokenizer(name, revision, settings.trust_remote_code)


def load_policy(ref: RunRef, settings: MeasureConfig) -> tuple[Any, Any]:
    """The model and the tokenizer of a policy, on this machine's accelerator if it has one."""
    import torch

    if ref.is_run and not ref.is_base:
        dtype = None if settings.dtype == "auto" else settings.dtype
        model, tokenizer = models.load_trained(
            Path(ref.source), dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    else:
        name, revision, dtype = ref.source, settings.model_revision, settings.dtype
        if ref.is_run:
            run = open_run(name)
            models.warn_of_ignored_trust(run, settings.trust_remote_code)
            name, revision = base_of(run), run.settings.get("model_revision") or "main"
            dtype = _dtype(ref, settings)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": settings.trust_remote_code}
        tokenizer = models.load_tokenizer(name, **options)
        model = models.load_model(name, dtype=dtype, attn_implementation=settings.attn_implementation, **options)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device), tokenizer  # pyright: ignore[reportArgumentType]
