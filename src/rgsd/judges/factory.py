"""Builds the judge that a `JudgeConfig` describes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError
from rgsd.inference.accounting import ledger_totals
from rgsd.judges.checks import ChecksJudge
from rgsd.judges.config import CUSTOM, JudgeConfig
from rgsd.judges.judgement import Judge, Usage
from rgsd.judges.llm import LLMJudge
from rgsd.rubrics import Example


def build_judge(config: JudgeConfig) -> Judge:
    """Build the judge for these settings.

    Raises:
        ConfigError: If an extra is missing, a budget is set but the price is unknown, or a custom judge cannot be
            imported or built.
    """
    if config.needs_checks:
        return ChecksJudge()
    if config.is_custom:
        return _custom_judge(config)
    return LLMJudge(config)


def missing_checks(examples: Sequence[Example], config: JudgeConfig) -> str:
    """Why the judge cannot judge the examples, or "" if it can. `checks` needs a check for every criterion."""
    n = sum(not e.rubric.is_checkable for e in examples) if config.needs_checks else 0
    return f"{n} of {len(examples)} rubrics have criteria without a programmatic check" if n else ""


def check_judgeable(examples: Sequence[Example], config: JudgeConfig) -> None:
    """Refuse examples that the judge cannot judge.

    Raises:
        ConfigError: If the judge runs checks, and criteria have none.
    """
    if problem := missing_checks(examples, config):
        raise ConfigError(
            f"{problem}: use an LLM judge, e.g. --judge openai/gpt-5.4, or --judge NAME --judge_api_base URL"
        )


def try_out(judge: Judge, *, lazily: bool = False) -> None:
    """Send an LLM judge a test call before any work (`LLMJudge.test_call`). Other judges have none.

    Raises:
        JudgeError: If the judge does not answer.
    """
    call = getattr(judge, "test_call", None)
    if call is not None:
        call(lazily=lazily)


def record_requests(judge: Judge, path: Path, arm: str) -> None:
    """Record all further requests of an LLM judge in a ledger, which `ledger_usage` reads. Other judges send none."""
    record = getattr(judge, "record_requests", None)
    if record is not None:
        record(path, _label(arm, judge.name))


def ledger_usage(path: Path, arm: str, judge: str) -> Usage | None:
    """The usage of a judge for an arm, according to a ledger. None if it has no such requests."""
    return ledger_totals(path).get(_label(arm, judge))


def _label(arm: str, judge: str) -> str:
    return f"{arm} | {judge}"


def _custom_judge(config: JudgeConfig) -> Judge:
    module, _, function = config.judge.removeprefix(CUSTOM).partition(":")
    if not module or not function:
        raise ConfigError(f"judge must be {CUSTOM}MODULE:FUNCTION, e.g. {CUSTOM}my_judges:build, got {config.judge!r}")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"judge {config.judge!r} cannot be imported ({error}): make sure that the module is on PYTHONPATH and "
            "defines this function"
        ) from error
    arguments: Any = config.judge_kwargs or {}
    try:
        judge = factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"judge {config.judge!r} cannot be built with judge_kwargs {arguments}: {error}") from error
    # Checked here, so that a wrong factory fails before the model is loaded.
    missing = [name for name in ("name", "judge", "judge_all") if not hasattr(judge, name)]
    if missing:
        raise ConfigError(
            f"judge {config.judge!r} returned a {type(judge).__name__} without {', '.join(missing)}: it must return a "
            "rgsd.judges.Judge"
        )
    return judge
