"""Settings of a judge."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError
from rgsd.settings import json_object, setting

OWN = "python:"
"""Begins the name of a judge of the user's own."""
MODES = ("batched", "per_criterion")
STRICTNESS = ("plain", "lenient", "strict")


@dataclass
class JudgeConfig:
    """Who judges, how, and what it may cost.

    Raises:
        ConfigError: for a value out of range or settings that contradict each other, naming the remedy.
    """

    judge: str = setting(
        "checks",
        "`checks` (the criteria's own programmatic checks); an LLM as PROVIDER/MODEL, e.g. openai/gpt-5.4, or, with "
        "judge_api_base, the name that the server gives its model; or a judge of your own as python:MODULE:FUNCTION, "
        "which is imported and called, and returns a rgsd.judges.Judge.",
    )
    judge_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments, as JSON, with which the FUNCTION of a judge of your own is called."
    )
    judge_api_base: str | None = setting(None, "Address of an OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    judge_api_key_env: str | None = setting(
        None, "Environment variable that holds the key. Unset: RGSD_JUDGE_API_KEY, then the provider's own variable."
    )
    judge_mode: str = setting(
        "batched",
        "All verdicts of a response in one call (the paper's way), or one call a criterion (HealthBench's way). "
        "Batched verdicts are stricter: never compare the two.",
        choices=list(MODES),
    )
    judge_strictness: str = setting(
        "plain",
        "How the judge decides doubtful cases. The overclaim audit compares lenient and strict.",
        choices=list(STRICTNESS),
    )
    judge_temperature: float | None = setting(1.0, "The judge's sampling temperature. Unset: the provider's default.")
    judge_max_tokens: int | None = setting(None, "Longest reply of the judge. Unset: the provider's default.")
    judge_reasoning_effort: str | None = setting(
        None, "Reasoning effort of a judge that has one.", choices=["none", "low", "medium", "high"]
    )
    judge_structured: bool = setting(
        True, "Ask for replies that follow a JSON schema. Unset it for a server that knows no `response_format`."
    )
    judge_test_call: bool = setting(
        True,
        "Send the judge one small request before any work, so that a wrong key, model or address is found at once. "
        "None is sent when the cache has every reply.",
    )
    judge_sample: int = setting(0, "Which draw of the judge; another number judges the same responses again.")
    judge_concurrency: int = setting(16, "Requests in flight at once.")
    judge_timeout: float = setting(120.0, "Seconds until a request is given up.")
    judge_retries: int = setting(5, "How often a request is sent again after a fault of the server or the network.")
    judge_retry_max_wait: float = setting(60.0, "Longest pause before a request is sent again, in seconds.")
    judge_reasks: int = setting(2, "How often the judge is asked again after a reply that cannot be used.")
    judge_give_up_after: int = setting(
        20, "Stop after so many judgements in a row failed for reasons of the server or the network."
    )
    judge_cache: str | None = setting(
        None,
        "File that keeps replies, so that none is bought twice; `off` keeps none. Unset: judge.sqlite in "
        "$RGSD_CACHE or ~/.cache/rgsd.",
    )
    judge_budget: float | None = setting(None, "US dollars that this command may spend on the judge. Unset: no limit.")
    judge_max_calls: int | None = setting(None, "Requests that this command may send to the judge. Unset: no limit.")
    judge_price_input: float | None = setting(
        None, "US dollars per million tokens read, for a judge that the price table does not know."
    )
    judge_price_output: float | None = setting(None, "US dollars per million tokens written, likewise.")

    def __post_init__(self) -> None:
        if not self.judge:
            raise ConfigError("judge is empty: name `checks` or an LLM as PROVIDER/MODEL")
        for name, known in (("judge_mode", MODES), ("judge_strictness", STRICTNESS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, known: {', '.join(known)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, at least {least} is wanted")
        if (self.judge_price_input is None) != (self.judge_price_output is None):
            raise ConfigError("judge_price_input and judge_price_output are set together or not at all")
        self.judge_kwargs = self._own_arguments()
        if self.is_llm and "/" not in self.judge and not self.judge_api_base:
            raise ConfigError(
                f"judge {self.judge!r} names no provider: write PROVIDER/MODEL (e.g. openai/{self.judge}), or set "
                "judge_api_base to the server that has this model"
            )

    @property
    def is_llm(self) -> bool:
        """Whether the judge is a language model."""
        return self.judge != "checks" and not self.is_own

    @property
    def is_own(self) -> bool:
        """Whether the judge is the user's own code."""
        return self.judge.startswith(OWN)

    @property
    def needs_checks(self) -> bool:
        """Whether it can judge nothing but criteria with a programmatic check."""
        return self.judge == "checks"

    def _own_arguments(self) -> dict[str, Any] | None:
        value = json_object("judge_kwargs", self.judge_kwargs)
        if value and not self.is_own:
            raise ConfigError(
                f"judge_kwargs is set, but judge is {self.judge!r}, which takes none: unset it, or name a judge of "
                f"your own as {OWN}MODULE:FUNCTION"
            )
        return value

    def cache_path(self) -> Path | None:
        """The file that keeps replies; None where none are kept."""
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
