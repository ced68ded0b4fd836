"""`rgsd export RUN OUT`: the trained model as a folder that transformers and vLLM load."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Merge a run's adapter into its base model in float32, write it with the tokenizer, and say what rounding cost."""
    parser = argparse.ArgumentParser(prog="rgsd export", description="Write a run's trained model, adapter merged.")
    parser.add_argument("run", help="a finished run's folder")
    parser.add_argument("out", help="a new or empty folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="unset: the run's own")
    parser.add_argument(
        "--trust_remote_code", type=lambda text: text.lower() in ("true", "1", "yes"), nargs="?", const=True,
        default=False, help="run code that comes with the base model; only for sources that you trust",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from rgsd.cli.train import quieten
    from rgsd.models import export

    quieten()
    folder, cost = export(args.run, args.out, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    print(cost)
    print(f"Model: {folder.resolve()}")
    return 0
