"""Settings of a judge."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError
from rgsd.settings import json_object, setting

CUSTOM = "python:"
"""The prefix of a custom judge's name."""
MODES = ("batched", "per_criterion")
STRICTNESS = ("plain", "lenient", "strict")


@dataclass
class JudgeConfig:
    """The judge, how it judges, and what it may cost.

    Raises:
        ConfigError: If a value is out of range, or settings contradict each other.
    """

    judge: str = setting(
        "checks",
        "`checks` (the criteria's programmatic checks); an LLM as PROVIDER/MODEL, e.g. openai/gpt-5.4, or with "
        "judge_api_base the server's name for its model; or a custom judge as python:MODULE:FUNCTION, where the "
        "function returns a rgsd.judges.Judge.",
    )
    judge_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments of a custom judge's FUNCTION, as JSON."
    )
    judge_api_base: str | None = setting(None, "Address of an OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    judge_api_key_env: str | None = setting(
        None, "Environment variable with the key. Unset: RGSD_JUDGE_API_KEY, then the provider's own variable."
    )
    judge_mode: str = setting(
        "batched",
        "One call per response, as in the paper, or one call per criterion, as in HealthBench. Batched verdicts are "
        "stricter, so never compare the two.",
        choices=list(MODES),
    )
    judge_strictness: str = setting(
        "plain",
        "How the judge decides in doubt. The overclaim audit compares lenient and strict.",
        choices=list(STRICTNESS),
    )
    judge_temperature: float | None = setting(1.0, "The judge's sampling temperature. Unset: the provider's default.")
    judge_max_tokens: int | None = setting(None, "Maximum length of a reply in tokens. Unset: the provider's default.")
    judge_reasoning_effort: str | None = setting(
        None, "The judge's reasoning effort, for models that have one.", choices=["none", "low", "medium", "high"]
    )
    judge_structured: bool = setting(
        True, "Request replies that follow a JSON schema. Set it to false for a server without `response_format`."
    )
    judge_test_call: bool = setting(
        True,
        "Send one small request before any work, to detect a wrong key, model or address at once. It is skipped if the "
        "cache has every reply.",
    )
    judge_sample: int = setting(0, "Index of the judge's sample: another number judges the same responses again.")
    judge_concurrency: int = setting(16, "Requests in flight at once.")
    judge_timeout: float = setting(120.0, "Timeout of a request, in seconds.")
    judge_retries: int = setting(5, "Retries of a request after a server or network error.")
    judge_retry_max_wait: float = setting(60.0, "Longest pause before a retry, in seconds.")
    judge_reasks: int = setting(2, "How often to ask again after an unusable reply.")
    judge_give_up_after: int = setting(
        20, "Stop after this many judgements in a row failed on server or network errors."
    )
    judge_cache: str | None = setting(
        None,
        "File that caches replies, so that none is paid for twice; `off` disables it. Unset: judge.sqlite in "
        "$RGSD_CACHE or ~/.cache/rgsd.",
    )
    judge_budget: float | None = setting(None, "Maximum cost of this command's judge in US dollars. Unset: no limit.")
    judge_max_calls: int | None = setting(
        None, "Maximum number of requests to the judge in this command. Unset: no limit."
    )
    judge_price_input: float | None = setting(
        None, "Price in US dollars per million input tokens, for a judge that is not in the price table."
    )
    judge_price_output: float | None = setting(None, "The same per million output tokens.")

    def __post_init__(self) -> None:
        if not self.judge:
            raise ConfigError("judge is empty: use `checks`, or an LLM as PROVIDER/MODEL")
        for name, known in (("judge_mode", MODES), ("judge_strictness", STRICTNESS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if (self.judge_price_input is None) != (self.judge_price_output is None):
            raise ConfigError("judge_price_input and judge_price_output must be set together")
        self.judge_kwargs = self._custom_arguments()
        if self.is_llm and "/" not in self.judge and not self.judge_api_base:
            raise ConfigError(
                f"judge {self.judge!r} has no provider: use PROVIDER/MODEL (e.g. openai/{self.judge}), or set "
                "judge_api_base to the server of this model"
            )

    @property
    def is_llm(self) -> bool:
        """Whether the judge is a language model."""
        return self.judge != "checks" and not self.is_custom

    @property
    def is_custom(self) -> bool:
        """Whether the judge is the user's own code."""
        return self.judge.startswith(CUSTOM)

    @property
    def needs_checks(self) -> bool:
        """Whether the judge can only judge criteria with a programmatic check."""
        return self.judge == "checks"

    def _custom_arguments(self) -> dict[str, Any] | None:
        value = json_object("judge_kwargs", self.judge_kwargs)
        if value and not self.is_custom:
            raise ConfigError(
                f"judge_kwargs is set, but judge {self.judge!r} takes none: remove it, or use a custom judge, "
                f"{CUSTOM}MODULE:FUNCTION"
            )
        return value

    def cache_path(self) -> Path | None:
        """The file that caches replies, or None if the cache is off."""
        if self.judge_cache == "off":
            return None
        if self.judge_cache:
            return Path(self.judge_cache)
        home = os.environ.get("RGSD_CACHE")
        return (Path(home) if home else Path.home() / ".cache" / "rgsd") / "judge.sqlite"


_LEAST = {
    "judge_temperature": 0.0,
    "judge_max_tokens": 1,
    "judge_sample": 0,
    "judge_concurrency": 1,
    "judge_timeout": 0.01,
    "judge_retries": 0,
    "judge_retry_max_wait": 0.0,
    "judge_reasks": 0,
    "judge_give_up_after": 1,
    "judge_budget": 0.0,
    "judge_max_calls": 0,
    "judge_price_input": 0.0,
    "judge_price_output": 0.0,
}
