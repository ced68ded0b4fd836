"""All errors that rgsd raises on purpose.

    RGSDError
    ├── DataError             a row, a file or a rubric that cannot be used
    │   └── CheckUndecided    a programmatic check that reached its limit of time or text
    ├── ConfigError           settings that contradict each other, the data or the machine
    │   ├── UsageError        a command line or recipe that cannot be parsed (exit code 2)
    │   └── PromptTooLong     a prompt above its limit; prompts are never truncated
    ├── ModelError            a model folder, tokenizer or chat template that cannot be used
    ├── RunError              a run folder that is missing, unfinished or would be overwritten
    ├── TrainingDiverged      a loss, gradient or weight that is not a finite number
    ├── Interrupted           a run that stopped after a SIGTERM, with its state saved
    └── JudgeError            a judge that cannot be reached, does not work, or has spent its budget
        ├── JudgeUnreachable  a judge that did not answer a test call
        └── BudgetExhausted   the judge's budget is spent; existing verdicts are kept

Each message says what was got, what was expected, and what to do.
"""

from __future__ import annotations


class RGSDError(Exception):
    """Base class of all errors that rgsd raises on purpose."""


class DataError(RGSDError):
    """A row, file or rubric that cannot be used."""


class CheckUndecided(DataError):
    """A programmatic check that reached its limit of time or text. Its criterion is unscored, never unmet."""


class ConfigError(RGSDError, ValueError):
    """Settings that contradict each other, the data or the machine."""


class UsageError(ConfigError):
    """A command line or a recipe that cannot be parsed: unknown flag, wrong type, invalid YAML. Exit code 2."""


class PromptTooLong(ConfigError):
    """A prompt that is longer than its limit. Prompts are refused, never truncated."""


class ModelError(RGSDError):
    """A model folder, tokenizer or chat template that cannot be used."""


class RunError(RGSDError):
    """A run folder that is missing, unfinished, or would be overwritten."""


class TrainingDiverged(RGSDError):
    """A non-finite loss, gradient or weight. The weights before that step are kept."""


class Interrupted(RGSDError):
    """A run that received SIGTERM and stopped after saving its state. Its exit code is 143, as usual for SIGTERM."""


class JudgeError(RGSDError):
    """A judge that cannot be reached, does not work, or has spent its budget.

    A single failed judgement is not an error. It is unscored.
    """


class JudgeUnreachable(JudgeError):
    """A judge that did not answer a test call."""


class BudgetExhausted(JudgeError):
    """The judge's budget is spent. Existing verdicts are kept."""
