"""Builds the judge that a `JudgeConfig` describes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError
from rgsd.inference.accounting import ledger_totals
from rgsd.judges.checks import ChecksJudge
from rgsd.judges.config import OWN, JudgeConfig
from rgsd.judges.judgement import Judge, Usage
from rgsd.judges.llm import LLMJudge
from rgsd.rubrics import Example


def build_judge(config: JudgeConfig) -> Judge:
    """The judge that the settings describe.

    Raises:
        ConfigError: when it needs what is not installed, or a budget in dollars and the judge's price is not known;
            when a judge of one's own cannot be imported or made.
    """
    if config.needs_checks:
        return ChecksJudge()
    if config.is_own:
        return _custom_judge(config)
    return LLMJudge(config)


def unchecked(examples: Sequence[Example], config: JudgeConfig) -> str:
    """Why the judge cannot judge the examples: `checks` needs a check for every criterion. Empty if it can."""
    n = sum(not e.rubric.is_checkable for e in examples) if config.needs_checks else 0
    return f"{n} of {len(examples)} rubrics have criteria without a programmatic check" if n else ""


def check_judgeable(examples: Sequence[Example], config: JudgeConfig) -> None:
    """Refuse examples that the judge cannot judge.

    Raises:
        ConfigError: If the judge runs checks, and criteria have none.
    """
    if problem := unchecked(examples, config):
        raise ConfigError(
            f"{problem}: name an LLM judge, for example --judge openai/gpt-5.4, or --judge NAME --judge_api_base URL"
        )


def try_out(judge: Judge, *, lazily: bool = False) -> None:
    """Find out whether an LLM judge answers at all, before any work; see `LLMJudge.test_call`. Others are not asked.

    Raises:
        JudgeError: when it does not.
    """
    call = getattr(judge, "test_call", None)
    if call is not None:
        call(lazily=lazily)


def record_requests(judge: Judge, path: Path, arm: str) -> None:
    """Record every further request of an LLM judge in a ledger; see `ledger_usage`. Other judges send none."""
    record = getattr(judge, "record_requests", None)
    if record is not None:
        record(path, _label(arm, judge.name))


def ledger_usage(path: Path, arm: str, judge: str) -> Usage | None:
    """What a ledger says about the requests of a judge for an arm; None if it has none."""
    return ledger_totals(path).get(_label(arm, judge))


def _label(arm: str, judge: str) -> str:
    return f"{arm} | {judge}"


def _custom_judge(config: JudgeConfig) -> Judge:
    module, _, function = config.judge.removeprefix(OWN).partition(":")
    if not module or not function:
        raise ConfigError(f"judge is {config.judge!r}, {OWN}MODULE:FUNCTION is wanted, e.g. {OWN}my_judges:build")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"judge {config.judge!r} cannot be imported ({error}): the module must be on Python's path (PYTHONPATH) "
            "and have this function"
        ) from error
    arguments: Any = config.judge_kwargs or {}
    try:
        judge = factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"judge {config.judge!r} cannot be made with judge_kwargs {arguments}: {error}") from error
    missing = [name for name in ("name", "judge", "judge_all") if not hasattr(judge, name)]
    if missing:
        raise ConfigError(
            f"judge {config.judge!r} made a {type(judge).__name__} without {', '.join(missing)}: a rgsd.judges.Judge "
            "is wanted"
        )
    return judge
