"""`rgsd explain MODEL_OR_RUN [EXAMPLE] [--FIELD VALUE ...] -o explain.html`: how far the rubric pulls each token."""

from __future__ import annotations

USAGE = """usage: rgsd explain MODEL [EXAMPLE] [--data D] [-o PAGE.html] [--FIELD VALUE ...]

MODEL is a hub id, a folder, a .gguf file, a run's folder (its trained policy), or RUN:base (what it was trained from).
EXAMPLE is an id of the data; without it the first held-out prompt. The student reads the prompt alone, the teacher, the
untrained model, the rubric too; the page colours each token of a response by how far they are apart there.
With --keep true, of a run, `rgsd report` shows the map too.
"""


def main(argv: list[str]) -> int:
    """Write the token map of one response."""
    from pathlib import Path

    from rgsd.cli.train import parse_plain, quieten, split_names

    names, flags = split_names(argv)
    flags = ["--output" if word == "-o" else word for word in flags]
    if "--help" in flags or "-h" in flags:
        print(USAGE)
    elif len(names) not in (1, 2):
        print(USAGE)
        return 2
    quieten()
    from rgsd.data.config import DataConfig
    from rgsd.errors import RunError
    from rgsd.report import token_page, write_page
    from rgsd.report.token_map import ExplainConfig, explain
    from rgsd.runs import write_json

    data, settings = parse_plain((DataConfig, ExplainConfig), flags, "explain")
    output = Path(settings.output)
    if output.exists() and not settings.overwrite:
        raise RunError(f"{output} is there already: choose another output (-o), or say --overwrite true to replace it")
    found = explain(names[0], names[1] if len(names) == 2 else None, data, settings)
    if output.suffix == ".json":
        write_json(str(output), found)
    else:
        write_page(output, token_page(found), overwrite=settings.overwrite)
    if found["mean"] is None:
        print(f"{found['example_id']}: no token of the response is in the loss (its reasoning was never closed)")
    else:
        print(
            f"{found['example_id']}: {found['n_tokens']} tokens, {found['mean']:.4f} nats a token "
            f"({found['mean_clipped']:.4f} after the clip), {100 * (found['top_tenth_share'] or 0):.0f} % of it on the "
            "top tenth of the tokens"
        )
    print(f"Page: {output.resolve()}")
    return 0
