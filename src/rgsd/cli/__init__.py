"""The command line: `rgsd COMMAND ...`. Parses, calls, and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 on success, 1 on an error that rgsd explains, 2 on a wrong call."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print("usage: rgsd COMMAND ...\n")
        print("\n".join(f"  {name:<10} {help}" for name, help in COMMANDS.items()))
        print("\n`rgsd COMMAND --help` lists a command's settings.")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rgsd {version('rgsd')}")
        return 0
    if args[0] not in COMMANDS:
        print(f"rgsd: unknown command {args[0]!r}, known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if not os.environ.get("RGSD_VERBOSE"):
        # The bar of GGUF files knows no other switch, and tqdm reads this one when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from rgsd.errors import Interrupted, RGSDError

    command: Callable[[list[str]], int] = import_module(f"rgsd.cli.{args[0]}").main
    try:
        return command(args[1:])
    except RGSDError as error:
        print(f"rgsd {args[0]}: {error}", file=sys.stderr)
        return 143 if isinstance(error, Interrupted) else 1
    except BrokenPipeError:  # the reader of our output has gone, as `rgsd data X | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in FAULTS_OF_THE_DISK:
            raise
        print(f"rgsd {args[0]}: cannot write {error.filename or 'a file'}: {error.strerror}. {GO_ON}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rgsd {args[0]}: interrupted", file=sys.stderr)
        return 130
