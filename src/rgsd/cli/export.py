"""`rgsd export RUN --output_dir DIR`: the trained model as a folder that transformers and vLLM load."""

from __future__ import annotations

from rgsd.cli.parsing import Command, Positional, quieten

COMMAND = Command(
    name="export",
    summary="write a run's trained model, adapter merged, as a folder that transformers and vLLM load",
    settings=("rgsd.workflows.export:ExportConfig",),
    positionals=(Positional("run", "folder of a finished run"),),
    examples=("rgsd export runs/mine --output_dir my-model",),
    details="Merges the adapter in float32, rounds each weight once, and prints what rounding cost.",
)


def main(argv: list[str]) -> int:
    """Export the model and print the cost of rounding."""
    parsed = COMMAND.parse(argv)
    (settings,) = parsed.settings
    quieten()
    from rgsd.models import export

    folder, cost = export(
        parsed.positionals["run"],
        settings.output_dir,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    print(cost)
    print(f"Model: {folder.resolve()}")
    return 0
