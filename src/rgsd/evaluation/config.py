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
    """How the policy is measured before and after, and where results may be written."""

    evaluate: bool = setting(True, "Measure base, base with rubric, and trained policy on the held-out prompts.")
    eval_max_new_tokens: int | None = setting(None, "Longest evaluated response. Unset: max_completion_length.")
    eval_generation_batch_size: int = setting(32, "Prompts generated at once in the evaluation.")
    max_eval_prompts: int | None = setting(
        None, "Evaluate on at most so many held-out prompts, sampled by split_seed. Unset: all of them."
    )
    self_written_references: bool = setting(
        False,
        "Let the base model write the reference responses beforehand, from the rubrics (privileged_context "
        "reference, both).",
    )
    overwrite: bool = setting(False, "Replace a run that the output_dir already holds.")


@dataclass
class MeasureConfig:
    """What is measured, with what, and where the rows go."""

    output_dir: str = setting("", "Folder of the rows. Unset: runs/eval-NAME or runs/gap-NAME.")
    backend: str = setting(
        "transformers",
        "What generates: transformers, vllm (extra `vllm`), or server (any OpenAI-compatible one at api_base).",
        choices=["transformers", "vllm", "server"],
    )
    api_base: str | None = setting(None, "Address of the server that generates, e.g. http://localhost:8000/v1.")
    api_key_env: str | None = setting(None, "Environment variable that holds that server's key.")
    concurrency: int = setting(16, "Requests to that server in flight at once.")
    timeout: float = setting(600.0, "Seconds until a request to it is given up.")
    extra_body: dict[str, Any] | str | None = setting(
        None, "More fields of its requests, as JSON, e.g. '{\"frequency_penalty\": 0.0}' for `transformers serve`."
    )
    prompt_opens_thinking: bool = setting(
        False, "The server's chat template opens the reasoning, and the server does not split it off."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Passed to the chat template, as JSON, e.g. '{\"enable_thinking\": false}'."
    )
    max_new_tokens: int = setting(1024, "Longest response, in tokens.")
    batch_size: int = setting(16, "Prompts generated at once by transformers.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy, as in the paper.")
    top_p: float = setting(1.0, "Sampling takes the likeliest words of this total probability.")
    seed: int = setting(0, "Seed of sampling, of the bootstrap, and of the mismatched rubrics.")
    dtype: str = setting("auto", "Weights' type, as transformers names it.")
    model_revision: str = setting("main", "Revision of a hub model.")
    attn_implementation: str | None = setting(None, "Attention, as transformers names it.")
    trust_remote_code: bool = setting(False, "Run code that comes with a model. Only for sources that you trust.")
    template: str = setting("paper", "Template with which a rubric is shown: paper, cover, system, or a .jinja file.")
    show_weights: bool = setting(False, "Show each criterion's weight in it.")
    think_open_tag: str = setting(OPEN_TAG, "Opens the reasoning of a thinking model.")
    think_close_tag: str = setting(CLOSE_TAG, "Closes it. Reasoning is taken out before judging.")
    max_prompts: int | None = setting(None, "Measure on at most so many prompts, sampled by split_seed.")
    min_coverage: float = setting(0.95, "Fail when the judge scored less than this share of an arm's criteria.")
    overwrite: bool = setting(False, "Replace what the output_dir holds, rather than go on with it.")

    def __post_init__(self) -> None:
        for name in ("extra_body", "chat_template_kwargs"):
            setattr(self, name, json_object(name, getattr(self, name)))
        if not 0.0 <= self.min_coverage <= 1.0:
            raise ConfigError(f"min_coverage is {self.min_coverage}: a share from 0 to 1 is wanted")
        if self.backend == "server" and not self.api_base:
            raise ConfigError("backend is `server`, but api_base names none: give its address, e.g. --api_base URL/v1")
        if self.backend != "server" and self.api_base:
            raise ConfigError(f"api_base is set, but backend is {self.backend!r}: say --backend server")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}: 0 (greedy) or more is wanted")

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
