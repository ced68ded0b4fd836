"""Imports go one way, as docs/architecture.md draws it; and rgsd imports in no time."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rgsd"
# A module may import those to its left, never to its right.
ORDER = [
    "errors",
    "redaction",
    "settings",
    "progress",
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
    "adapters",
    "teacher",
    "config",
    "rows",
    "runs",
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
    "judges": {"torch", "transformers", "trl", "rgsd.training.trainer"},
    "divergence": {
        "transformers",
        "trl",
        "rgsd.training.config",
        "rgsd.training.trainer",
        "rgsd.rubrics",
        "rgsd.prompts.messages",
    },
    "batching": {"transformers", "trl", "rgsd.rubrics", "rgsd.training.loss"},
    "fast": {"trl", "rgsd.rubrics", "rgsd.prompts.messages", "rgsd.training.teacher", "rgsd.training.config"},
    "trainer": {"rgsd.judges", "rgsd.evaluation.evaluate", "rgsd.runs", "rgsd.data"},
    "evaluate": {"trl", "rgsd.training.trainer", "rgsd.training.loss"},
    "statistics": {"torch", "transformers", "trl"},
    "compare": {"torch", "transformers", "trl"},
    "report": {"torch", "transformers", "trl", "rgsd.judges"},
    "agreement": {"torch", "transformers", "trl"},
    "grpo": {"rgsd.training.trainer", "rgsd.training.loss", "rgsd.training.teacher"},
    "sft": {"rgsd.training.trainer", "rgsd.training.loss", "rgsd.training.teacher", "rgsd.training.grpo"},
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


# --- TRL's private members

# Every private member of TRL's trainers that rgsd reads, writes or overrides, by file. A release of TRL may change any
# of them: go through this list then. trainer.py holds what RGSD needs; checkpoints.py needs TRL's log, sampler and
# saving, for all three trainers alike.
TOUCHED = {
    "trainer.py": {
        *("_buffered_inputs", "_dist", "_forward_redirection", "_generate", "_generate_single_turn", "_metrics"),
        *("_name", "_paper", "_prepare_inputs", "_step", "_tag_names", "_tokenize_prompts", "_tokenizer"),
    },
    "checkpoints.py": {
        *("_dist", "_get_train_sampler", "_load_optimizer_and_scheduler", "_metrics", "_save_checkpoint"),
        "_total_train_tokens",
    },
}
TRL_SOURCE = Path(importlib.util.find_spec("trl").origin).parent / "trainer"
TRL_TRAINERS = ("base_trainer.py", "distillation_trainer.py", "grpo_trainer.py", "sft_trainer.py")


def own_private(tree):
    """Private methods, class attributes and `self._x` that a file's classes define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield part.name
                elif isinstance(part, ast.Assign | ast.AnnAssign):
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    yield from (t.id for t in targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


PRIVATE_IN_TRL = {n for f in TRL_TRAINERS for n in own_private(ast.parse((TRL_SOURCE / f).read_text()))} - {"__init__"}
PRIVATE_IN_TRL = {n for n in PRIVATE_IN_TRL if is_private(n)}


def is_a_trainer(node):
    """Whether a class is, or is mixed into, one of TRL's trainers."""
    bases = {b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in node.bases}
    return any(name.endswith("Trainer") for name in bases) or bool(bases & {"CheckpointMixin", "_Base"})


def touches(source):
    """TRL's private members that a module reads, writes or overrides.

    `self._x` in a class that is no trainer is the class's own, and so is `other._x` in a module whose classes that are
    no trainers define `_x`.
    """
    tree = ast.parse(source)
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    trainers = [n for n in classes if is_a_trainer(n)]
    others = [n for n in classes if n not in trainers]
    elsewhere = {name for n in others for name in own_private(ast.Module([n], []))}
    inside = {id(part) for n in trainers for part in ast.walk(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE_IN_TRL:
            if id(node) in inside or node.attr not in elsewhere:
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
            if name in PRIVATE_IN_TRL:
                yield name
    for trainer in trainers:
        yield from set(own_private(ast.Module([trainer], []))) & PRIVATE_IN_TRL


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_trls_internals_are_touched_where_it_is_said(path):
    assert not [n for n in imports(path) if n.startswith("trl.")], "trl's submodules are private too"
    assert set(touches(path.read_text())) == TOUCHED.get(str(path.relative_to(SOURCE)), set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(trainer):\n    trainer._metrics['train'].clear()", {"_metrics"}),
        ("class A(GRPOTrainer):\n    def _generate(self, prompts): ...", {"_generate"}),
        ("class A(CheckpointMixin):\n    def f(self): return self._buffered_inputs", {"_buffered_inputs"}),
        ("def f(t):\n    return getattr(t, '_logs', None)", {"_logs"}),
        ("class A:\n    def __init__(self): self._metrics = 1", set()),
        ("class A:\n    def _generate(self): ...\n    def f(self): return self._generate()", set()),
    ],
)
def test_a_touch_of_trls_internals_is_found(source, found):
    """The scan itself: it sees reads, overrides and getattr, and takes no other class's own members for TRL's."""
    assert set(touches(source)) == found
