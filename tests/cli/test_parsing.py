"""The parser of all commands: booleans, typos, recipes with line numbers, help."""

import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module

import pytest

from rgsd.cli import COMMANDS, main
from rgsd.cli.parsing import Command, Positional
from rgsd.errors import UsageError
from rgsd.settings import setting


@dataclass
class ToyConfig:
    """Settings of a toy command."""

    steps: int = setting(4, "Steps.")
    rate: float = setting(0.5, "Rate.")
    quiet: bool = setting(False, "Print less.")
    save: bool = setting(True, "Save.")
    bf16: bool | None = setting(None, "Use bf16.")
    names: list[str] | None = setting(None, "Names.")
    kind: str = setting("a", "Kind.", choices=["a", "b"])
    output: str | None = setting(None, "File.", aliases=["-o"])


COMMAND = Command(
    name="toy",
    summary="play",
    settings=(f"{__name__}:ToyConfig",),
    positionals=(Positional("run", "a run", "+"),),
    examples=("rgsd toy x --quiet",),
)


def parsed(*argv):
    return COMMAND.parse(["x", *argv]).settings[0]


def every_command():
    for name in COMMANDS:
        module = import_module(f"rgsd.cli.{name}")
        yield from (c for c in (module.COMMAND, getattr(module, "PRETRAIN", None)) if c)


@pytest.mark.parametrize("name", ["quiet", "save", "bf16"])
def test_booleans_are_written_alike(name):
    assert getattr(parsed(f"--{name}"), name) is True
    assert getattr(parsed(f"--no_{name}"), name) is False
    for word, value in {"true": True, "false": False, "no": False, "1": True}.items():
        assert getattr(parsed(f"--{name}", word), name) is value
        assert getattr(parsed(f"--{name}={word}"), name) is value


def test_a_boolean_flag_leaves_the_positional_after_it():
    result = COMMAND.parse(["--quiet", "x", "y", "-o", "f.json"])
    assert result.positionals == {"run": ["x", "y"]}
    assert (result.settings[0].quiet, result.settings[0].output) == (True, "f.json")
    assert result.given == {"quiet", "output"}


def test_a_typo_names_the_nearest_flag():
    with pytest.raises(UsageError, match=r"--stps.*--steps"):
        parsed("--stps", "4")
    with pytest.raises(UsageError, match="--step "):  # no abbreviations
        parsed("--step", "4")


def test_wrong_types_choices_and_missing_positionals_are_usage_errors():
    for argv, named in ((["x", "--steps", "two"], "steps.*two"), (["x", "--kind", "c"], "kind.*c"), ([], "RUN")):
        with pytest.raises(UsageError, match=named):
            COMMAND.parse(argv)


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: 8\nrate: 1e-4\nnames: [p, q]\nbf16: null\nquiet: true\n")
    settings = parsed("--config", str(recipe), "--steps", "2", "--no_quiet")
    assert (settings.steps, settings.rate, settings.names, settings.quiet) == (2, 1e-4, ["p", "q"], False)
    assert COMMAND.parse(["x", f"--config={recipe}"]).given == {"steps", "rate", "names", "bf16", "quiet"}


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("steps: 1\nnames: [a\n", 3, "YAML"),
        ("steps: 1\nstps: 2\n", 2, "stps.*steps"),
        ("steps: 1\nrate: fast\n", 2, "rate.*fast"),
        ("steps: 1\n\nkind: c\n", 3, "kind.*c"),
        ("steps: 1\nsteps: 2\n", 2, "steps.*line 1"),
        ("- steps\n", 1, "mapping"),
    ],
)
def test_a_bad_recipe_is_an_error_with_its_line(tmp_path, text, line, named):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=rf"r\.yaml:{line}:.*{named}"):
        parsed("--config", str(recipe))


def test_a_wrong_flag_is_not_blamed_on_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: 1\n")
    with pytest.raises(UsageError) as caught:
        parsed("--config", str(recipe), "--steps", "two")
    assert "r.yaml" not in str(caught.value)


def test_the_help_begins_with_summary_usage_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    order = [text.index(part) for part in ("Play.", "Usage: rgsd toy RUN", "a run", "Examples:", "Settings of a toy")]
    assert order == sorted(order)
    assert "--output, -o" in text


def test_help_of_train_shows_our_settings_and_trls_on_request(capsys):
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help-all"]) == 0
    full = capsys.readouterr().out
    assert "--clip_threshold" in short
    assert "--weight_decay" not in short
    assert full.index("--clip_threshold") < full.index("--weight_decay")


def test_a_usage_error_is_one_line_and_code_2(capsys):
    assert main(["train", "--learning_rte", "1"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "--learning_rate" in error
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_every_command_has_summary_examples_and_one_spelling_for_outputs():
    for command in every_command():
        assert command.summary
        assert command.examples
        flags = command.flags()
        assert "--out" not in flags, command.name
        # The split of a dataset is --data_split; the lab's --split chooses the prompts to measure on.
        assert not {"--data", "--split"} <= flags.keys(), command.name
        if "--output" in flags:
            assert flags["-o"] is flags["--output"], command.name
        booleans = [i for i in flags.values() if i.is_boolean]
        assert all("--no_" + i.name not in flags for i in booleans)


def test_the_overview_imports_no_heavy_library():
    code = "import sys; from rgsd.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
