"""Imports go one way, between packages and inside them, as docs/architecture.md draws it; and importing rgsd is
fast."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "rgsd"
# Bottom up. A module may import from its own package and from the layers before it.
LAYERS = [
    "errors",
    "settings",
    "redaction",
    "files",
    "rubrics",
    "progress",
    "rows",
    "provenance",
    "runs",
    "prompts",
    "data",
    "models",
    "inference",
    "judges",
    "training",
    "evaluation",
    "report",
    "workflows",
    "lab",
    "cli",
]
MOST_PACKAGES = 12
TORCH = {"torch", "transformers", "trl", "peft", "accelerate"}
# Imports that a package or a file must not have, beyond its layer.
FORBIDDEN = {
    "rubrics": TORCH | {"numpy", "datasets"},
    "data": TORCH | {"tokenizers"},
    "prompts/messages.py": TORCH | {"tokenizers"},
    "prompts/mismatched.py": TORCH | {"tokenizers"},
    "prompts/rendering.py": TORCH | {"tokenizers"},
    "prompts/leaks.py": TORCH | {"rgsd.rubrics"},
    "judges": TORCH,
    "models/kernels": {"trl", "rgsd.rubrics", "rgsd.prompts"},
    "training/loss.py": {"transformers", "trl", "rgsd.training", "rgsd.rubrics", "rgsd.prompts"},
    "models/batching.py": {"transformers", "trl", "rgsd.rubrics"},
    "training/trainer.py": {"rgsd.judges", "rgsd.runs", "rgsd.data"},
    "training/grpo.py": {"rgsd.training.trainer", "rgsd.training.loss", "rgsd.training.teacher"},
    "training/sft.py": {"rgsd.training.trainer", "rgsd.training.loss", "rgsd.training.teacher", "rgsd.training.grpo"},
    "evaluation": {"trl"},
    "evaluation/statistics.py": TORCH | {"rgsd.judges", "rgsd.runs"},
    "evaluation/samples.py": TORCH,
    "evaluation/summaries.py": TORCH,
    "evaluation/compare": TORCH,
    "report/facts.py": TORCH | {"rgsd.judges"},
    "report/page.py": TORCH | {"rgsd.judges"},
    "runs.py": {"transformers"},
}


def imports(path):
    """Every module that a file imports, at module level or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(path):
    """The modules named in a file's imports, without the names taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if layer_of(p) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path):
    home, name = layer_of(path), str(path.relative_to(SOURCE))
    for module in imports(path):
        parts = module.split(".")
        is_ours = parts[0] == "rgsd" and len(parts) > 1 and parts[1] != home and parts[1] in LAYERS
        if is_ours:
            assert LAYERS.index(parts[1]) < LAYERS.index(home), f"{name} imports {module}, which stands above it"
        for prefix, banned in FORBIDDEN.items():
            if name == prefix or name.startswith(f"{prefix}/"):
                assert not any(f"{module}.".startswith(f"{b}.") for b in banned), f"{name} must not know {module}"


def test_every_name_at_the_top_has_its_layer():
    assert {layer_of(p) for p in FILES} == set(LAYERS)
    assert sum((SOURCE / name).is_dir() for name in LAYERS) <= MOST_PACKAGES


def test_no_file_imports_itself_in_a_circle():
    """Checks files, not packages, so a cycle inside a package counts too. Imports inside functions count."""
    names = {
        ".".join(("rgsd", *p.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
    }
    graph = defaultdict(set)
    for name, path in names.items():
        graph[name] = {m for m in imports(path) if m in names and m != name and not name.startswith(f"{m}.")}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            trail.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(trail.pop())

    for name in names:
        visit(name)


def test_every_package_says_what_it_is():
    for name in LAYERS:
        if (SOURCE / name).is_dir():
            text = ast.get_docstring(ast.parse((SOURCE / name / "__init__.py").read_text()))
            assert text, f"{name}/__init__.py has no docstring"
            assert "TODO" not in text, f"{name}/__init__.py has a placeholder"


def test_every_imported_package_is_declared():
    """In pyproject.toml, as a dependency or in an extra: a package that only another package brings may disappear with
    its next release."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}
    declared |= {"vllm"}  # declared as trl[vllm], which pins the supported versions
    homes = metadata.packages_distributions()
    missing = set()
    for path in FILES:
        for top in {m.split(".")[0] for m in modules(path)} - {"rgsd", "__future__"} - set(sys.stdlib_module_names):
            names = {n.lower().replace("_", "-") for n in homes.get(top, [top])}
            if not names & declared:
                missing.add(f"{path.relative_to(SOURCE)} imports {top}: declare {sorted(names)}")
    assert not missing


def test_importing_rgsd_is_cheap():
    heavy = ("torch", "transformers", "datasets", "trl")
    code = f"import rgsd, rgsd.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- TRL's private members

# Every private member of TRL's trainers that rgsd reads, writes or overrides, by file. A TRL release may change any of
# them, so review this list at each upgrade. training/trainer.py has the members that RGSD needs.
# training/checkpoint_mixin.py has those of TRL's log, sampler and saving, for all three trainers.
TOUCHED = {
    "training/grpo.py": {"_generate_single_turn"},  # samples without the checkpoint's generation_config
    "training/trainer.py": {
        *("_buffered_inputs", "_dist", "_forward_redirection", "_generate", "_generate_single_turn", "_metrics"),
        *("_name", "_paper", "_prepare_inputs", "_step", "_tag_names", "_tokenize_prompts", "_tokenizer"),
    },
    "training/checkpoint_mixin.py": {
        *("_dist", "_get_train_sampler", "_load_optimizer_and_scheduler", "_metrics", "_save_checkpoint"),
        *("_send_telemetry", "_total_train_tokens"),
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
    assert not [n for n in modules(path) if n.startswith("trl.")], "trl's submodules are private too"
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
    """The scan itself: it finds reads, overrides and getattr, and ignores the members of other classes."""
    assert set(touches(source)) == found
