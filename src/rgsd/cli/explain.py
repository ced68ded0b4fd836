"""`rgsd explain MODEL [EXAMPLE] -o explain.html`: how far the rubric moves each token of a response."""

from __future__ import annotations

from pathlib import Path

from rgsd.cli.parsing import Command, Positional, quieten

COMMAND = Command(
    name="explain",
    summary="color each token of a response by how far the rubric moves the model there",
    settings=("rgsd.report.token_map:ExplainConfig", "rgsd.data.config:DataConfig"),
    positionals=(
        Positional("model", "a hub id, a folder, a .gguf file, or a run: RUN (trained) or RUN:base (untrained)"),
        Positional("example_id", "id of the prompt (default: the first held-out prompt)", "?"),
    ),
    examples=(
        "rgsd explain embedded-warm --template cover -o explain.html",
        "rgsd explain runs/mine --keep",
    ),
    details="The student reads the prompt alone; the teacher, the untrained model, reads the rubric too. The page "
    "colors each token of a response by the divergence between the two. `rgsd report` shows maps made with --keep.",
)


def main(argv: list[str]) -> int:
    """Write the token map of one response."""
    parsed = COMMAND.parse(argv)
    quieten()
    from rgsd.errors import RunError
    from rgsd.files import write_json
    from rgsd.report import token_page, write_page
    from rgsd.report.token_map import explain

    settings, data = parsed.settings
    output = Path(settings.output)
    if output.exists() and not settings.overwrite:
        raise RunError(f"{output} exists: choose another file with -o, or replace it with --overwrite")
    facts = explain(parsed.positionals["model"], parsed.positionals["example_id"], data, settings)
    if output.suffix == ".json":
        write_json(str(output), facts)
    else:
        write_page(output, token_page(facts), overwrite=settings.overwrite)
    if facts["mean"] is None:
        print(f"{facts['example_id']}: no token of the response is in the loss (its reasoning was never closed)")
    else:
        print(
            f"{facts['example_id']}: {facts['n_tokens']} tokens, {facts['mean']:.4f} nats per token "
            f"({facts['mean_clipped']:.4f} after the clip), {100 * (facts['top_tenth_share'] or 0):.0f} % of it on the "
            "top tenth of the tokens"
        )
    print(f"Page: {output.resolve()}")
    return 0
