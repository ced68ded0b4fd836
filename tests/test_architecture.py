"""Imports go one way, as docs/architecture.md draws it; and rgsd imports in no time."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rgsd"
# A module may import those to its left, never to its right.
ORDER = [
    "errors",
    "settings",
    "leaks",
    "rubrics",
    "thinking",
    "judges",
    "datasets",
    "prompts",
    "batching",
    "fast",
    "divergence",
    "sharding",
    "teacher",
    "config",
    "runs",
    "progress",
    "checkpoints",
    "launch",
    "costs",
    "statistics",
    "models",
    "generation",
    "evaluate",
    "replay",
    "trainer",
    "grpo",
    "sft",
    "pipeline",
    "dry_run",
    "measure",
    "gap",
    "audits",
    "agreement",
    "compare",
    "report",
    "explain",
    "warmstart",
    "starter",
    "doctor",
    "lab",
    "cli",
]
FORBIDDEN = {
    "rubrics": {"torch", "transformers", "numpy", "datasets", "trl"},
    "datasets": {"torch", "transformers", "tokenizers", "trl"},
    "leaks": {"torch", "transformers", "trl", "rgsd.rubrics"},
    "prompts": {"torch", "transformers", "tokenizers", "trl"},
    "judges": {"torch", "transformers", "trl", "rgsd.trainer"},
    "divergence": {"transformers", "trl", "rgsd.config", "rgsd.trainer", "rgsd.rubrics", "rgsd.prompts"},
    "batching": {"transformers", "trl", "rgsd.rubrics", "rgsd.divergence"},
    "fast": {"trl", "rgsd.rubrics", "rgsd.prompts", "rgsd.teacher", "rgsd.config"},
    "trainer": {"rgsd.judges", "rgsd.evaluate", "rgsd.runs", "rgsd.datasets"},
    "evaluate": {"trl", "rgsd.trainer", "rgsd.divergence"},
    "statistics": {"torch", "transformers", "trl"},
    "compare": {"torch", "transformers", "trl"},
    "report": {"torch", "transformers", "trl", "rgsd.judges"},
    "agreement": {"torch", "transformers", "trl"},
    "grpo": {"rgsd.trainer", "rgsd.divergence", "rgsd.teacher"},
    "sft": {"rgsd.trainer", "rgsd.divergence", "rgsd.teacher", "rgsd.grpo"},
    "runs": {"rgsd.models", "transformers"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "rgsd":
                yield from (f"rgsd.{alias.name}" for alias in node.names)


def module_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [p for p in SOURCE.rglob("*.py") if module_of(p) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    home = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "rgsd" and len(parts) > 1 and parts[1] != home and parts[1] in ORDER:
            late = path.name == "models.py" and parts[1] == "runs"  # export reads a run, at call time
            assert late or ORDER.index(parts[1]) < ORDER.index(home), f"{home} imports {name}"
        for banned in FORBIDDEN.get(home, ()):
            assert not f"{name}.".startswith(f"{banned}."), f"{home} must not know {banned}"


def test_every_module_has_its_place():
    assert {module_of(p) for p in FILES} == set(ORDER)


def test_importing_rgsd_is_cheap():
    heavy = ("torch", "transformers", "datasets", "trl")
    code = f"import rgsd, rgsd.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_trls_internals_are_touched_in_one_file():
    inside = [p for p in FILES if any(n.startswith("trl.") for n in imports(p))]
    assert {p.name for p in inside} <= {"trainer.py"}
