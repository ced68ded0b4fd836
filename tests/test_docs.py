"""The docs: their commands parse, and the first hour runs as written. `make docs` builds the site in strict mode."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from conftest import tiny_model

from rgsd.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(rgsd [^`]+)`")

RUN_FOR_REAL = {
    "init": "workflows/test_init.py",
    "doctor": "workflows/test_doctor.py",
    "train": "cli/test_cli.py",
    "grpo": "cli/test_cli.py",
    "eval": "cli/test_cli.py",
    "export": "cli/test_cli.py",
    "data": "cli/test_cli.py",
    "report": "report/test_report.py",
    "explain": "report/test_explain.py",
    "compare": "evaluation/test_compare.py",
    "judge": "evaluation/test_agreement.py",
}
"""Commands that a test runs as a user does, by name, and where."""


def commands(page):
    """(line, is_block) of each `rgsd ...` in a page; a command on several lines counts as one."""
    text = page.read_text("utf-8")
    for kind, body in FENCE.findall(text):
        if kind in ("", "sh", "bash", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                if line.strip().removeprefix("$ ").startswith("rgsd "):
                    yield line.strip().removeprefix("$ "), True
    for line in INLINE.findall(FENCE.sub("", text)):
        yield " ".join(line.split()), False


FOUND = [(p, line, block) for p in PAGES for line, block in commands(p)]


@pytest.mark.parametrize(("page", "line", "block"), FOUND, ids=[f"{p.stem}: {line[:60]}" for p, line, _ in FOUND])
def test_every_command_in_the_docs_names_a_command_and_flags_that_exist(page, line, block):
    words = [w for w in shlex.split(line, comments=True)[1:] if not set(w) & set("[]<>") and w.strip(".")]
    if not words or words[0] in ("COMMAND", "--help", "--version"):
        return
    assert words[0] in COMMANDS, f"{page.name}: unknown command in `{line}`"
    module = import_module(f"rgsd.cli.{words[0]}")
    flags = (module.PRETRAIN if words[1:2] == ["pretrain"] else module.COMMAND).flags()
    for at, word in enumerate(words):
        flag, _, value = word.partition("=")
        if not word.startswith("-") or flag in ("--SETTING", "--judge_SETTING", "--help", "--help-all", "--config"):
            continue
        flag = re.sub("^--no_", "--", flag)
        assert flag in flags, f"{page.name}: `{line}`: {words[0]} has no {flag}"
        if flags[flag].choices and not value and at + 1 < len(words):
            value = words[at + 1]
            assert value.upper() == value or value in flags[flag].choices, f"{page.name}: `{line}`: {flag} {value}"


def test_the_docs_have_commands_to_check():
    assert len([1 for _, _, block in FOUND if block]) > 15
    assert {line.split()[1] for _, line, _ in FOUND} >= {"train", "report", "explain", "gap", "eval"}


@pytest.mark.parametrize(("name", "file"), sorted(RUN_FOR_REAL.items()))
def test_commands_said_to_be_run_for_real_are(name, file):
    text = (ROOT / "tests" / file).read_text("utf-8")
    calls = (f'main(["{name}"', f'["{name}", ', f"from rgsd.cli.{name} import main")
    assert any(call in text for call in calls), f"{file} does not run `rgsd {name}`"


def test_the_recipes_and_files_that_the_docs_name_exist():
    for page in PAGES:
        for path in set(
            re.findall(r"\b((?:recipes|docs|tests|src|benchmarks)/[\w./-]+\.\w+)", page.read_text("utf-8"))
        ):
            assert (ROOT / path).exists() or path == "docs/LAB.md", f"{page.name} names {path}, which is not there"


def test_the_first_hour_runs_as_written(tmp_path, tokenizer, monkeypatch, capsys):
    """Every command of docs/first-hour.md in order, with a model and lengths small enough for a unit test."""
    monkeypatch.chdir(tmp_path)
    tiny_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    small = {
        "train": "--model_name_or_path model --max_steps 2 --max_completion_length 8 --eval_max_new_tokens 8 "
        "--bf16 false --use_cpu true",
        "explain": "--max_new_tokens 8",
    }
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = []
    for line, block in commands(ROOT / "docs" / "first-hour.md"):
        if not block:
            continue
        name, *rest = shlex.split(line, comments=True)[1:]
        rest = ["model" if word == "embedded-warm" else word for word in rest]
        assert main([name, *rest, *small.get(name, "").split()]) == 0, line
        ran.append(name)
    assert ran == ["doctor", "init", "data", "explain", "train", "report", "export"]
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert "Judged by programmatic checks" in (tmp_path / "report.html").read_text()


def test_the_settings_page_has_a_table_for_every_class_of_settings():
    shown = set(re.findall(r"<!-- settings: ([\w.]+) -->", (ROOT / "docs" / "settings.md").read_text()))
    declared = set()
    for file in (ROOT / "src").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        declared |= {f"{module}.{name}" for name in re.findall(r"^class (\w+Config)\b", file.read_text(), re.MULTILINE)}
    declared.discard("rgsd.inference.sampling.SamplingConfig")  # made from other settings, for a generator
    public = {"rgsd.judges.config.JudgeConfig": "rgsd.judges.JudgeConfig"}
    declared -= {"rgsd.inference.sampling.SamplingConfig"}  # built from the settings of each command
    assert {public.get(name, name) for name in declared} == shown
    assert len(shown) > 10
