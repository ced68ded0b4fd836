"""Settings of an evaluation: in a training run (`EvalConfig`), and of `rgsd eval` and `rgsd gap` (`MeasureConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rgsd.errors import ConfigError
from rgsd.inference import SamplingConfig
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG
from rgsd.settings import json_object, setting


@dataclass
class EvalConfig:
    """How a training run evaluates the policy before and after."""

    evaluate: bool = setting(
        True, "Evaluate the base, the base with the rubric, and the trained policy on the held-out prompts."
    )
    eval_max_new_tokens: int | None = setting(
        None, "Longest evaluated response, in tokens. Unset: max_completion_length."
    )
    eval_generation_batch_size: int = setting(32, "Prompts generated at once in the evaluation.")
    max_eval_prompts: int | None = setting(
        None, "Evaluate on at most this many held-out prompts, sampled with split_seed. Unset: all."
    )
    self_written_references: bool = setting(
        False,
        "Let the base model write the references from the rubrics before training (privileged_context reference or "
        "both).",
    )
    control: bool = setting(
        False,
        "Then train the mismatched twin into RUN/control: the same recipe, with another prompt's rubric for each "
        "prompt. The table says what the right rubric added.",
    )
    report: bool = setting(False, "At the end write RUN/report.html, with the token map of one held-out prompt.")
    overwrite: bool = setting(False, "Replace the run in output_dir, if there is one.")


@dataclass
class MeasureConfig:
    """What to evaluate, with which backend and settings, and where the samples go."""

    output_dir: str = setting("", "Folder of the run. Unset: runs/eval-NAME or runs/gap-NAME.")
    backend: str = setting(
        "transformers",
        "Backend that generates: transformers, vllm (extra `vllm`), or server (OpenAI-compatible, at api_base).",
        choices=["transformers", "vllm", "server"],
    )
    api_base: str | None = setting(None, "Address of the server, e.g. http://localhost:8000/v1.")
    api_key_env: str | None = setting(None, "Environment variable with the server's key.")
    concurrency: int = setting(16, "Concurrent requests to the server.")
    timeout: float = setting(600.0, "Timeout of a request to the server, in seconds.")
    extra_body: dict[str, Any] | str | None = setting(
        None, "Extra fields of its requests, as JSON, e.g. '{\"frequency_penalty\": 0.0}' for `transformers serve`."
    )
    prompt_opens_thinking: bool = setting(
        False, "The server's chat template opens the reasoning, and the server returns it in the text."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Passed to the chat template, as JSON, e.g. '{\"enable_thinking\": false}'."
    )
    max_new_tokens: int = setting(1024, "Longest response, in tokens.")
    batch_size: int = setting(16, "Batch size of transformers.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy, as in the paper.")
    top_p: float = setting(1.0, "Sample from the most likely tokens up to this total probability.")
    seed: int = setting(0, "Seed of sampling, the bootstrap, and the mismatched rubrics.")
    dtype: str = setting("auto", "Type of the weights, as in transformers.")
    model_revision: str = setting("main", "Revision of a hub model.")
    attn_implementation: str | None = setting(None, "Attention implementation, as in transformers.")
    trust_remote_code: bool = setting(False, "Run code that ships with a model. Only for sources you trust.")
    template: str = setting("paper", "Template that shows the rubric: paper, cover, system, or a .jinja file.")
    show_weights: bool = setting(False, "Show each criterion's weight in the template.")
    think_open_tag: str = setting(
        OPEN_TAG, "Opens the reasoning of a thinking model. A run's own tags count by default."
    )
    think_close_tag: str = setting(CLOSE_TAG, "Closes it. Reasoning is removed before judging.")
    max_prompts: int | None = setting(None, "Evaluate on at most this many prompts, sampled with split_seed.")
    min_coverage: float = setting(0.95, "Fail if the judge scored a smaller share of an arm's criteria.")
    overwrite: bool = setting(False, "Replace the evaluation in output_dir instead of continuing it.")

    def __post_init__(self) -> None:
        for name in ("extra_body", "chat_template_kwargs"):
            setattr(self, name, json_object(name, getattr(self, name)))
        if not 0.0 <= self.min_coverage <= 1.0:
            raise ConfigError(f"min_coverage must be between 0 and 1, got {self.min_coverage}")
        if self.backend == "server" and not self.api_base:
            raise ConfigError("backend `server` needs an address: set it with --api_base URL/v1")
        if self.backend != "server" and self.api_base:
            raise ConfigError(f"api_base needs backend `server`, got {self.backend!r}: set --backend server")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be at least 0 (greedy), got {self.temperature}")

    def sampling(self) -> SamplingConfig:
        """The sampling settings of a generator."""
        template: Any = self.chat_template_kwargs or {}
        return SamplingConfig(
            self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            chat_template_kwargs=template,
            think_tags=self.think_tags,
        )

    @property
    def think_tags(self) -> tuple[str, str]:
        """The tags of the reasoning."""
        return self.think_open_tag, self.think_close_tag
