"""The errors a user can meet, one tree.

    RGSDError
    ├── DataError             a row, a file or a rubric that cannot be used
    │   └── CheckUndecided    a programmatic check that reached its limit of time or text
    ├── ConfigError           settings that contradict each other, the data or the machine
    │   ├── UsageError        a command line or recipe that cannot be parsed (exit code 2)
    │   └── PromptTooLong     a prompt above its limit; prompts are never truncated
    ├── ModelError            a model folder, tokenizer or chat template that cannot be used
    ├── RunError              a run folder that is missing, unfinished or would be overwritten
    ├── TrainingDiverged      a loss, gradient or weight that is not a finite number
    ├── Interrupted           a run that was told to stop, and stopped after saving
    └── JudgeError            a judge that cannot be reached, asked or afforded
        ├── JudgeUnreachable  a judge that did not answer a test call
        └── BudgetExhausted   the judge's budget is spent; what was judged is kept

Each message says what it got, what it wanted, and what to do.
"""

from __future__ import annotations


class RGSDError(Exception):
    """Base of every error that rgsd raises on purpose."""


class DataError(RGSDError):
    """A row, file or rubric that cannot be used."""


class CheckUndecided(DataError):
    """A programmatic check that reached its limit of time or text. Its criterion is unscored, never unmet."""


class ConfigError(RGSDError, ValueError):
    """Settings that contradict each other, the data or the machine."""


class UsageError(ConfigError):
    """A command line or a recipe that cannot be parsed: unknown flag, wrong type, invalid YAML. Exit code 2."""


class PromptTooLong(ConfigError):
    """A prompt longer than its limit. Prompts are refused, never cut."""


class ModelError(RGSDError):
    """A model folder, tokenizer or chat template that cannot be used."""


class RunError(RGSDError):
    """A run folder that is missing, unfinished, or would be overwritten."""


class TrainingDiverged(RGSDError):
    """A loss, gradient or weight that is not a finite number. The weights before that step are kept."""


class Interrupted(RGSDError):
    """A run that was told to stop (SIGTERM), and stopped after saving. Its exit code is 143, as that signal's."""


class JudgeError(RGSDError):
    """A judge that cannot be reached, asked or afforded. A single failed judgement is no error: it is unscored."""


class JudgeUnreachable(JudgeError):
    """A judge that did not answer a test call."""


class BudgetExhausted(JudgeError):
    """The judge's budget is spent. What was judged is kept."""
