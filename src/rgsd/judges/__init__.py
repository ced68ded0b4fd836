"""Judges, which decide whether a response meets its criteria: programmatic checks, an LLM, or your own."""

from __future__ import annotations

from rgsd.judges.checks import ChecksJudge
from rgsd.judges.config import JudgeConfig
from rgsd.judges.factory import build_judge, check_judgeable, ledger_usage, missing_checks, record_requests, try_out
from rgsd.judges.judgement import Judge, Judgement, Task, Usage

__all__ = [
    "ChecksJudge",
    "Judge",
    "JudgeConfig",
    "Judgement",
    "Task",
    "Usage",
    "build_judge",
    "check_judgeable",
    "ledger_usage",
    "missing_checks",
    "record_requests",
    "try_out",
]
