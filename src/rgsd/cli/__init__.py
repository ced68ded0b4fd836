"""The command line: `rgsd COMMAND ...`. Parses, calls, and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

COMMANDS = {
    "init": "write a commented recipe and rubrics of your own to begin with",
    "doctor": "what is installed, which device, what is missing and how to get it",
    "train": "train a model on rubric data, and measure it on held-out prompts",
    "grpo": "train with judge-based GRPO, the peer, on the same data",
    "sft": "fine-tune on the conditioned model's own responses, the off-policy control",
    "gap": "before training: what the rubric in the prompt is worth to a model",
    "eval": "measure models and runs on rubric data, with checks or an LLM judge",
    "compare": "compare runs on the same prompts, criterion by criterion",
    "audit": "false claims, overclaims and longer responses in the stored responses of runs",
    "judge": "check a judge against human verdicts",
    "data": "tell what a rubric file holds, and show an example as student and teacher read it",
    "lab": "the paper's comparisons in minutes on a CPU, with an exact judge",
    "warmstart": "teach a small base model to follow a rubric that it is shown (supervised, before RGSD)",
    "report": "one HTML page about runs: result, curves, cost, criteria, responses side by side",
    "explain": "colour each token of a response by how far the rubric pulls it; before any training, too",
    "export": "write a run's trained model as a folder that transformers and vLLM load",
}


FAULTS_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
GO_ON = "Make room or choose another folder; what was written before is kept, and the same command goes on from it"
UNEXPECTED = 70
"""The exit code of an error that rgsd does not explain: EX_SOFTWARE of sysexits.h."""
DEBUG = "RGSD_DEBUG"
"""Set by `--debug`; processes that a launcher starts inherit it."""
TRAINERS_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
"""Values of transformers' own setting `debug`, which keeps its meaning when it has one of these."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 on an error that rgsd explains, 2 on a wrong call, 70 on an unexpected error, which is one line
        here and a traceback in a log file (`--debug` prints the traceback too), 130 on Ctrl-C, 143 on SIGTERM.
    """
    args, is_debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    if not args or args[0] in ("-h", "--help"):
        print("usage: rgsd COMMAND ...\n")
        print("\n".join(f"  {name:<10} {help}" for name, help in COMMANDS.items()))
        print("\n`rgsd COMMAND --help` lists a command's settings. `--debug` prints the traceback of any error.")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rgsd {version('rgsd')}")
        return 0
    if args[0] not in COMMANDS:
        print(f"rgsd: unknown command {args[0]!r}, known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # TRL reports each trainer that is built to the hub. huggingface_hub reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not os.environ.get("RGSD_VERBOSE"):
        # The bar of GGUF files knows no other switch, and tqdm reads this one when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    if is_debug:
        os.environ[DEBUG] = "1"
    from rgsd.redaction import RedactingStream

    out, err = sys.stdout, sys.stderr
    # Whatever prints, libraries too: no credential reaches the terminal.
    sys.stdout, sys.stderr = cast(Any, RedactingStream(out)), cast(Any, RedactingStream(err))
    try:
        return _run(args[0], args[1:], is_debug=bool(os.environ.get(DEBUG)))
    finally:
        sys.stdout, sys.stderr = out, err
        if is_debug:
            os.environ.pop(DEBUG, None)


def _run(name: str, args: list[str], *, is_debug: bool) -> int:
    """The command, its errors turned into a line and an exit code."""
    from rgsd.errors import Interrupted, RGSDError
    from rgsd.redaction import redact

    def fail(text: str, code: int) -> int:
        if is_debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        print(redact(f"rgsd {name}: {text}"), file=sys.stderr)
        return code

    try:
        command: Callable[[list[str]], int] = import_module(f"rgsd.cli.{name}").main
        return command(args)
    except RGSDError as error:
        return fail(str(error), 143 if isinstance(error, Interrupted) else 1)
    except BrokenPipeError:  # the reader of our output has gone, as `rgsd data X | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:  # nothing goes beyond this: the user gets a line, the traceback a file
        if isinstance(error, OSError) and error.errno in FAULTS_OF_THE_DISK:
            return fail(f"cannot write {error.filename or 'a file'}: {error.strerror}. {GO_ON}", 1)
        log = _log_of(name, args)
        where = f"the traceback is in {log}" if log else "its traceback could not be written to a file: use --debug"
        first = (str(error).strip() or "no message").splitlines()[0]
        return fail(
            f"unexpected {type(error).__name__}: {redact(first)[:300]}. This is a bug in rgsd; {where}", UNEXPECTED
        )


def _without_debug(args: list[str]) -> tuple[list[str], bool]:
    """The arguments without a `--debug` of ours, and whether there was one."""
    left = [
        word
        for i, word in enumerate(args)
        if word != "--debug" or (i + 1 < len(args) and args[i + 1] in TRAINERS_DEBUG)
    ]
    return left, len(left) < len(args)


def _log_of(name: str, args: Sequence[str]) -> Path | None:
    """Write the current exception, its command and the versions to a new file; None where none can be written."""
    from importlib.metadata import version

    from rgsd.redaction import redact, redact_arguments

    text = (
        f"rgsd {version('rgsd')}, Python {platform.python_version()}, {platform.platform()}\n"
        f"rgsd {name} {' '.join(redact_arguments(args))}\n\n{redact(traceback.format_exc())}"
    )
    home = os.environ.get("RGSD_CACHE")
    file = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{os.getpid()}.log"
    for folder in (Path(home) if home else Path.home() / ".cache" / "rgsd", Path(tempfile.gettempdir()) / "rgsd"):
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            (folder / "logs" / file).write_text(text, "utf-8", errors="backslashreplace")
        except OSError:
            continue
        return folder / "logs" / file
    return None
