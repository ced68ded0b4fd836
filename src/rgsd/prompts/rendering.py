"""Templates of the teacher's prompt: a bundled one or a user's own file, checked and rendered.

A template comes from a user and criteria come from data, so rendering is sandboxed, and a template can load no other
file. Mistakes that would silently change training are errors: an unknown variable, or a prompt that does not contain
what it should show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
from jinja2 import meta, nodes

from rgsd.errors import ConfigError
from rgsd.prompts.sandbox import Sandbox
from rgsd.rubrics import Criterion, Rubric

Place = Literal["user", "system"]
"""Where the rendered text goes: in place of the last user turn, or at the end of the system turn."""

PITFALL_PREFIX = "Mistake to avoid: "
"""Precedes a criterion of negative weight, whose text describes a bad response."""

VARIABLES = ("question", "criteria", "rubric", "reference")
"""The variables of a template."""

_HELP = (
    "a template may use {{ question }}, {{ rubric }} (the numbered list), {% for c in criteria %} with c.text, "
    "c.weight, c.is_pitfall, c.title, c.tags, c.mark and c.line, and {{ reference }}"
)
_PLACE = re.compile(r"\A\s*\{#-?\s*place:\s*(\S*?)\s*-?#\}")
_PLACE_ANYWHERE = re.compile(r"\{#-?\s*place:")
# Errors inside a template: jinja's own, and those of Python's operators and filters.
_RENDER_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError,
    MemoryError,
)  # fmt: skip
MAX_SOURCE_BYTES = 1_000_000
"""Largest file of a template."""


@dataclass(frozen=True, slots=True)
class ShownCriterion:
    """A criterion as a template sees it.

    Args:
        text: The criterion, without surrounding white space.
        weight: Its points, negative for a pitfall.
        is_pitfall: Whether it describes what to avoid.
        title: Its short name, or None.
        tags: The dataset's labels.
        mark: " [weight=5]" if weights are shown, else "".
        line: The numbered line, e.g. "2. Mistake to avoid: Recommends antibiotics for a cold. [weight=-5]".
    """

    text: str
    weight: float
    is_pitfall: bool
    title: str | None
    tags: tuple[str, ...]
    mark: str
    line: str


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template.

    Args:
        where: Its name or path, for errors.
        place: Where its text goes.
        n_lines: Its number of lines, for errors.
        compiled: The template.
        environment: Its sandbox.
    """

    where: str
    place: Place
    n_lines: int
    compiled: jinja2.Template
    environment: Sandbox


def template_names() -> list[str]:
    """The names of the bundled templates."""
    files = resources.files("rgsd.prompts").joinpath("templates").iterdir()
    return sorted(f.name.removesuffix(".jinja") for f in files if f.name.endswith(".jinja"))


def template_source(template: str) -> str:
    """The source of a template.

    Args:
        template: A name, or a path that ends in .jinja or .txt.

    Raises:
        ConfigError: If there is no such template, or the file cannot be read as UTF-8.
    """
    if not isinstance(template, str) or not template:
        raise ConfigError(f"template must be a name or a path, got {template!r}: try 'paper'")
    if template.endswith((".jinja", ".txt")):
        return _file_text(template)
    names = template_names()
    if template not in names:
        raise ConfigError(
            f"unknown template {template!r}: use one of {', '.join(names)}, or the path of your own .jinja or .txt file"
        )
    return resources.files("rgsd.prompts").joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")


def _file_text(path: str) -> str:
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():
            raise ConfigError(f"template {path!r} is not a regular file: name a file")
        if (size := file.stat().st_size) > MAX_SOURCE_BYTES:
            raise ConfigError(f"template {path!r} has {size:,} bytes, {MAX_SOURCE_BYTES:,} are allowed: shorten it")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"template {path!r} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"template {path!r} is not UTF-8 ({error.reason}): save it as UTF-8") from error


def load_template(template: str) -> Template:
    """Load and compile a template by name or path.

    Raises:
        ConfigError: If it cannot be read or compiled, or uses unknown variables.
    """
    # The source is read each time, because a file may change. Equal sources are compiled once.
    return _compile(template_source(template), template)


@lru_cache(maxsize=64)
def _compile(source: str, where: str) -> Template:
    # Otherwise every prompt would end with the file's last newline.
    source = source.rstrip()
    environment = Sandbox()
    try:
        tree = environment.parse(source, where, where)
        _check_names(tree, where)
        code = environment.compile(environment.limited(tree), where, where)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deep: simplify it") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: {error.message}. Fix it: {_HELP}") from error
    compiled = environment.template_class.from_code(environment, code, environment.make_globals(None))
    return Template(where, _place(source, where), source.count("\n") + 1, compiled, environment)


def _check_names(tree: nodes.Template, where: str) -> None:
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise ConfigError(
            f"{where}, line {node.lineno}: a template cannot load another one: copy its text into this file"
        )
    unknown = meta.find_undeclared_variables(tree) - set(VARIABLES)
    for node in tree.find_all(nodes.Name):
        if node.name in unknown:
            raise ConfigError(f"{where}, line {node.lineno}: unknown variable {node.name!r}: {_HELP}")


def _place(source: str, where: str) -> Place:
    remedy = "start the file with {# place: user #} or {# place: system #}, or remove the comment for user"
    match = _PLACE.match(source)
    if match and match[1] == "user":
        return "user"
    if match and match[1] == "system":
        return "system"
    misplaced = match or _PLACE_ANYWHERE.search(source)
    if misplaced:
        line = source.count("\n", 0, source.index("{#", misplaced.start())) + 1
        got = repr(match[1]) if match else "a place comment that is malformed or not at the start of the file"
        raise ConfigError(f"{where}, line {line}: got {got}: {remedy}")
    return "user"


def _shown_criteria(rubric: Rubric, show_weights: bool) -> list[ShownCriterion]:
    return [_shown(number, criterion, show_weights) for number, criterion in enumerate(rubric, 1)]


def _shown(number: int, criterion: Criterion, show_weights: bool) -> ShownCriterion:
    text = criterion.text.strip()
    mark = f" [weight={criterion.weight:.10g}]" if show_weights else ""
    lead = f"{number}. "
    line = lead + (PITFALL_PREFIX if criterion.is_pitfall else "") + text + mark
    # Indent continuation lines, so that a criterion of several lines stays one entry of the list.
    line = line.replace("\n", "\n" + " " * len(lead))
    return ShownCriterion(
        text, criterion.weight, criterion.is_pitfall, criterion.title, tuple(criterion.tags), mark, line
    )


def render(
    template: Template,
    question: str,
    rubric: Rubric | None,
    reference: str | None,
    *,
    show_weights: bool,
    privileged_context: str,
    where: str,
) -> str:
    """Render a template, and make sure that the result contains what it should show.

    Args:
        template: The template.
        question: The last user turn.
        rubric: The criteria to show, or None.
        reference: The reference response to show, or None.
        show_weights: Whether to append the weight to each criterion.
        privileged_context: For errors.
        where: Names the example in errors.

    Raises:
        ConfigError: If the template fails, or leaves out the question, all criteria, or the reference.
    """
    criteria = [] if rubric is None else _shown_criteria(rubric, show_weights)
    try:
        rendered = template.environment.render(
            template.compiled,
            question=question,
            criteria=criteria,
            rubric="\n".join(c.line for c in criteria),
            reference=reference,
        )
    except _RENDER_ERRORS as error:
        line = _error_line(error, template)
        raise ConfigError(f"{template.where}, line {line}: {error}, on {where}. Fix it: {_HELP}") from error
    at = f"{template.where}, lines 1-{template.n_lines}: on {where}, with privileged_context {privileged_context!r}, "
    _check_shown(template, rendered, question, criteria, reference, at)
    return rendered


def _error_line(error: Exception, template: Template) -> int:
    line, trace = 1, error.__traceback__
    while trace is not None:
        # jinja gives the frames of a template its file name and line numbers.
        if trace.tb_frame.f_code.co_filename == template.where:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _check_shown(
    template: Template, rendered: str, question: str, criteria: Sequence[ShownCriterion], reference: str | None, at: str
) -> None:
    """Refuse a prompt that omits what the teacher should see: training would silently learn nothing."""
    text = folded(rendered)
    if template.place == "user" and folded(question) not in text:
        raise ConfigError(
            at + "the rendered text, which replaces the user's turn, does not contain the question: "
            "add {{ question }}, unchanged, or start the file with {# place: system #}"
        )
    if criteria and not any(folded(part) in text for c in criteria for part in (c.text, c.title) if part):
        raise ConfigError(at + "the rendered text contains no criterion: add {{ rubric }}, or a loop over criteria")
    if reference is not None and folded(reference) not in text:
        raise ConfigError(at + "the rendered text does not contain the reference: add {{ reference }}, unchanged")


def folded(text: str) -> str:
    """Text with case and white space folded, so that a template may indent, wrap or capitalize."""
    return " ".join(text.split()).casefold()
