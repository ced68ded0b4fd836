"""The command line: `rgsd COMMAND ...`. Runs one command and turns errors into exit codes.

Each module is a command: its declaration (`COMMAND`, see `parsing.py`) and a `main` that calls a workflow.
"""

from __future__ import annotations

import difflib
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

COMMANDS = (
    "init", "doctor", "data", "gap", "explain", "train", "eval", "report", "export",
    "compare", "audit", "judge", "grpo", "sft", "warmstart", "lab",
)  # fmt: skip
"""Modules of this package, one per command, in the order of a first project."""

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
UNEXPECTED = 70
"""Exit code of an error that rgsd does not explain: EX_SOFTWARE of sysexits.h."""
DEBUG = "RGSD_DEBUG"
"""Environment variable that `--debug` sets; launched processes inherit it."""
TRAINERS_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
"""With one of these values `--debug` keeps its meaning in transformers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success, 1 for an error that rgsd explains, 2 for a command line or recipe that cannot be parsed, 70 for
        an unexpected error (one line here, the traceback in a log file; `--debug` prints it too), 130 for Ctrl-C, 143
        for SIGTERM.
    """
    args, is_debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rgsd {version('rgsd')}")
        return 0
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
        print(f"rgsd: unknown command {args[0]!r}, {hint}", file=sys.stderr)
        return 2
    # TRL reports every trainer that is built to the hub. huggingface_hub reads this variable at import.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not os.environ.get("RGSD_VERBOSE"):
        # The progress bar of GGUF files has no other switch; tqdm reads this variable at import.
        os.environ.setdefault("TQDM_DISABLE", "1")
    if is_debug:
        os.environ[DEBUG] = "1"
    from rgsd.redaction import RedactingStream

    out, err = sys.stdout, sys.stderr
    # Libraries print too; no credential may reach the terminal.
    sys.stdout, sys.stderr = cast(Any, RedactingStream(out)), cast(Any, RedactingStream(err))
    try:
        return _run(args[0], args[1:], is_debug=bool(os.environ.get(DEBUG)))
    finally:
        sys.stdout, sys.stderr = out, err
        if is_debug:
            os.environ.pop(DEBUG, None)


def _overview() -> str:
    """All commands with their summaries. Their modules import neither torch nor transformers."""
    lines = ["Usage: rgsd COMMAND [ARGUMENT ...] [--SETTING VALUE ...]", ""]
    lines += [f"  {name:<10} {import_module(f'rgsd.cli.{name}').COMMAND.summary}" for name in COMMANDS]
    return "\n".join([*lines, "", "`rgsd COMMAND --help` lists a command's settings; `--debug` prints tracebacks."])


def _run(name: str, args: list[str], *, is_debug: bool) -> int:
    """Run a command and turn its errors into one line and an exit code."""
    from rgsd.errors import Interrupted, RGSDError, UsageError
    from rgsd.redaction import redact

    def fail(text: str, code: int) -> int:
        if is_debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        print(redact(f"rgsd {name}: {text}"), file=sys.stderr)
        return code

    try:
        command: Callable[[list[str]], int] = import_module(f"rgsd.cli.{name}").main
        return command(args)
    except SystemExit as stop:  # --help; a library may pass its error's text instead of a code
        if isinstance(stop.code, str):
            return fail(stop.code, 1)
        return stop.code or 0
    except UsageError as error:
        return fail(str(error), 2)
    except RGSDError as error:
        return fail(str(error), 143 if isinstance(error, Interrupted) else 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:  # the last resort: one line for the user, the traceback in a file
        if isinstance(error, BrokenPipeError) and _reader_has_gone():  # as in `rgsd data X | head`
            return 0
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return fail(
                f"cannot write {error.filename or 'a file'}: {error.strerror}. Free some space or choose another "
                "folder; earlier results are kept, and the same command resumes from them",
                1,
            )
        log = _write_log(name, args)
        where = f"the traceback is in {log}" if log else "the traceback could not be saved: add --debug to print it"
        first = (str(error).strip() or "no message").splitlines()[0]
        return fail(
            f"unexpected {type(error).__name__}: {redact(first)[:300]}. This is a bug in rgsd; {where}", UNEXPECTED
        )


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more; output is discarded from then on."""
    import select

    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the system, as in a notebook
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _without_debug(args: list[str]) -> tuple[list[str], bool]:
    """The arguments without our `--debug`, and whether it was there."""
    left = [
        word
        for i, word in enumerate(args)
        if word != "--debug" or (i + 1 < len(args) and args[i + 1] in TRAINERS_DEBUG)
    ]
    return left, len(left) < len(args)


def _write_log(name: str, args: Sequence[str]) -> Path | None:
    """Write the current exception, the command and the versions to a new log file; None when no folder is writable."""
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
