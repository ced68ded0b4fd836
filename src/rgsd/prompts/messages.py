"""Turns an example into the chat messages that the student and the teacher read. Knows no tokenizer and no model.

The student reads the prompt. The teacher, the same base policy, also reads a privileged context: the rubric (arXiv
2606.12507, figure 10), a reference response, or both. Two controls show it another prompt's rubric or nothing. A
template words the privileged context: a file in `rgsd/prompts/templates/` or one of yours.

Three parts: settings and messages, templates, and the derangement behind the mismatched control.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from rgsd.errors import ConfigError
from rgsd.rubrics import Criterion, Example, Rubric

# --- Settings and messages ------------------------------------------------------------------------------------------

ChatMessages = list[dict[str, str]]
"""A conversation in the form chat templates take: [{"role": ..., "content": ...}, ...]."""

PrivilegedContext = Literal["rubric", "reference", "both", "mismatched", "none"]
"""What the teacher reads besides the prompt. "mismatched" and "none" are controls."""

PRIVILEGED_CONTEXTS: tuple[str, ...] = get_args(PrivilegedContext)
SHOWS_RUBRIC = frozenset({"rubric", "both", "mismatched"})
SHOWS_REFERENCE = frozenset({"reference", "both"})

N_IDS_LISTED = 5
"""Number of example ids that an error lists. It counts all of them."""


@dataclass(frozen=True)
class PromptSettings:
    """Settings of the teacher's prompt.

    Args:
        template: A template's name (see `template_names`) or the path of a .jinja or .txt file.
        show_weights: Append the signed weight to each criterion, e.g. "[weight=5]", as ProRubric does. Reproductions of
            the paper show no weights.
        privileged_context: "rubric" (the method), "reference" (a reference response instead of the rubric), "both",
            "mismatched" (control: another prompt's rubric) or "none" (control: the teacher reads what the student
            reads).
        max_criteria: Show at most this many criteria, those with the largest |weight|, in published order. None shows
            all.
        criteria_tags: Show only criteria with at least one of these tags. Empty shows all.
        seed: Picks the derangement of "mismatched". Zero or more.

    Raises:
        ConfigError: If a setting is malformed, or the template cannot show the privileged context.
    """

    template: str = "paper"
    show_weights: bool = False
    privileged_context: PrivilegedContext = "rubric"
    max_criteria: int | None = None
    criteria_tags: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.criteria_tags, list):  # what YAML and JSON make of a tuple
            object.__setattr__(self, "criteria_tags", tuple(self.criteria_tags))
        if self.privileged_context not in PRIVILEGED_CONTEXTS:
            raise ConfigError(
                f"unknown privileged_context {self.privileged_context!r}: use one of {', '.join(PRIVILEGED_CONTEXTS)}"
            )
        if not isinstance(self.show_weights, bool):
            raise ConfigError(f"show_weights must be true or false, got {self.show_weights!r}")
        if self.max_criteria is not None and not _is_whole(self.max_criteria, at_least=1):
            raise ConfigError(
                f"max_criteria must be a whole number of 1 or more, or none for all, got {self.max_criteria!r}"
            )
        if not _is_whole(self.seed, at_least=0):
            raise ConfigError(f"seed must be a whole number of 0 or more, got {self.seed!r}")
        self._check_tags()
        _check_template(self)

    def _check_tags(self) -> None:
        tags: object = self.criteria_tags
        if not isinstance(tags, tuple) or not all(isinstance(tag, str) and tag for tag in tags):
            raise ConfigError(
                f'criteria_tags must be a list of tags, such as ["axis:accuracy"], got {tags!r}: '
                "write a single tag as a list of one"
            )


def student_messages(example: Example) -> ChatMessages:
    """The prompt alone, as the student reads it."""
    return [dict(message) for message in example.messages]


def teacher_messages(
    example: Example, settings: PromptSettings, *, shown: Rubric | None = None, reference: str | None = None
) -> ChatMessages:
    """The prompt with its privileged context, as the teacher reads it before the student's response.

    Args:
        example: The example.
        settings: Settings of the prompt. With privileged_context "none", the result equals `student_messages(example)`.
        shown: A rubric to show instead of the example's own. Required for "mismatched".
        reference: A reference response to show instead of the example's own.

    Raises:
        ConfigError: If the rubric or reference to show is missing, if no criterion has one of `criteria_tags`, or if
            the template fails on this example or does not render what it should show.
    """
    if settings.privileged_context == "none":
        return student_messages(example)
    rubric = _rubric_to_show(example, settings, shown) if settings.privileged_context in SHOWS_RUBRIC else None
    text = None
    if settings.privileged_context in SHOWS_REFERENCE:
        text = example.reference if reference is None else reference
        if text is None or not text.strip():
            raise ConfigError(_missing_references([example.id], settings))
    template = _load(settings.template)
    question = example.messages[-1]["content"]
    rendered = _render(template, settings, question, rubric, text, of=f"example {example.id!r}")
    return _placed(example, template.place, rendered)


def training_rows(
    examples: Sequence[Example], settings: PromptSettings, references: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One row per example: {"example_id": id, "prompt": student's messages, "teacher_prompt": teacher's messages}.

    Args:
        examples: The training set, in order.
        settings: Settings of the teacher's prompts.
        references: Example id -> reference response, e.g. written by the base model before training. If given, the
            examples' own references are ignored: a run never mixes the two.

    Raises:
        ConfigError: As `teacher_messages`; if references are missing (counted, with the first ids); if "mismatched"
            has no derangement.
    """
    given = [e.reference if references is None else references.get(e.id) for e in examples]
    if settings.privileged_context in SHOWS_REFERENCE:
        missing = [e.id for e, text in zip(examples, given, strict=True) if text is None or not text.strip()]
        if missing:
            raise ConfigError(_missing_references(missing, settings))
    if settings.privileged_context in SHOWS_RUBRIC:
        untagged = [e.id for e in examples if not _bearing(e.rubric, settings.criteria_tags)]
        if untagged:
            raise ConfigError(_no_tagged_criterion(untagged, settings))
    shown = _rubrics_shown(examples, settings)
    return [
        {
            "example_id": example.id,
            "prompt": student_messages(example),
            "teacher_prompt": teacher_messages(example, settings, shown=rubric, reference=reference),
        }
        for example, rubric, reference in zip(examples, shown, given, strict=True)
    ]


def teacher_prompts(
    examples: Sequence[Example], settings: PromptSettings, references: Mapping[str, str] | None = None
) -> list[ChatMessages]:
    """One prompt per example, with its privileged context; arguments and errors as in `training_rows`.

    With privileged_context "none", these are the student's prompts.
    """
    return [row["teacher_prompt"] for row in training_rows(examples, settings, references)]


def reference_request(example: Example) -> ChatMessages:
    """The prompt with which the base model writes a reference response before training: the paper's teacher prompt.

    Used by the paper's ablation, which shows the teacher such a self-written reference instead of the rubric.
    """
    return teacher_messages(example, PromptSettings())


def select_criteria(rubric: Rubric, settings: PromptSettings) -> tuple[Criterion, ...]:
    """The criteria to show, in published order. Empty if none has one of `criteria_tags`."""
    bearing = _bearing(rubric, settings.criteria_tags)
    # The sort is stable, so the first published criterion wins among equal weights.
    heaviest = sorted(range(len(bearing)), key=lambda i: -abs(bearing[i].weight))[: settings.max_criteria]
    return tuple(bearing[i] for i in sorted(heaviest))


def _is_whole(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _bearing(rubric: Rubric, tags: tuple[str, ...]) -> list[Criterion]:
    return [c for c in rubric if not tags or set(tags) & set(c.tags)]


def _rubric_to_show(example: Example, settings: PromptSettings, shown: Rubric | None) -> Rubric:
    if shown is None and settings.privileged_context == "mismatched":
        raise ConfigError(
            f"privileged_context 'mismatched' shows example {example.id!r} another prompt's rubric, and got none: "
            "pass it as `shown`, or let `training_rows` pick one for every example"
        )
    criteria = select_criteria(example.rubric if shown is None else shown, settings)
    if not criteria:
        raise ConfigError(_no_tagged_criterion([example.id], settings))
    return Rubric(criteria)


def _rubrics_shown(examples: Sequence[Example], settings: PromptSettings) -> list[Rubric | None]:
    """The rubric shown in place of each example's own. None where its own is shown."""
    if settings.privileged_context != "mismatched":
        return [None] * len(examples)
    # Compare rubrics as shown: two that differ can become equal when max_criteria cuts them.
    cut = [replace(e, rubric=Rubric(select_criteria(e.rubric, settings))) for e in examples]
    return [examples[other].rubric for other in derangement(cut, settings.seed)]


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:N_IDS_LISTED]) + (", ..." if len(ids) > N_IDS_LISTED else "")


def _missing_references(ids: Sequence[str], settings: PromptSettings) -> str:
    return (
        f"privileged_context {settings.privileged_context!r} needs a reference response per example, and {len(ids)} "
        f"have none: {_listed(ids)}. Let the base model write them (self_written_references), remove "
        "these examples, or use privileged_context 'rubric'"
    )


def _no_tagged_criterion(ids: Sequence[str], settings: PromptSettings) -> str:
    return (
        f"{len(ids)} examples have no criterion with any of the tags {', '.join(settings.criteria_tags)}: "
        f"{_listed(ids)}. Remove these examples or change criteria_tags"
    )


def _placed(example: Example, place: Place, text: str) -> ChatMessages:
    messages = student_messages(example)
    if place == "user":
        messages[-1]["content"] = text
        return messages
    for message in messages:
        if message["role"] in ("system", "developer"):
            message["content"] = f"{message['content']}\n\n{text}" if message["content"].strip() else text
            return messages
    return [{"role": "system", "content": text}, *messages]


# --- Templates ------------------------------------------------------------------------------------------------------

Place = Literal["user", "system"]
"""Where a rendered template goes: in the last user turn's place, or at the end of the system turn."""

PITFALL_PREFIX = "Mistake to avoid: "
"""Put before a criterion of negative weight, whose text says what a bad response does."""

VARIABLES = ("question", "criteria", "rubric", "reference")
"""What a template may use."""

_HELP = (
    "a template may use {{ question }}, {{ rubric }} (the numbered list), {% for c in criteria %} with c.text, "
    "c.weight, c.is_pitfall, c.title, c.tags, c.mark and c.line, and {{ reference }}"
)
_PLACE = re.compile(r"\A\s*\{#-?\s*place:\s*(\S*?)\s*-?#\}")
_PLACE_ANYWHERE = re.compile(r"\{#-?\s*place:")
# What can go wrong inside a template: jinja's own errors, and those of Python's operators and filters.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError)


@dataclass(frozen=True, slots=True)
class ShownCriterion:
    """A criterion as a template sees it.

    Args:
        text: the criterion, without white space at either end.
        weight: its points, negative for a pitfall.
        is_pitfall: whether it says what to avoid.
        title: its short name, or none.
        tags: what the dataset says about it.
        mark: " [weight=5]" when weights are shown, else "".
        line: the numbered line: "2. Mistake to avoid: Recommends antibiotics for a cold. [weight=-5]".
    """

    text: str
    weight: float
    is_pitfall: bool
    title: str | None
    tags: tuple[str, ...]
    mark: str
    line: str


@dataclass(frozen=True, slots=True)
class _Template:
    where: str
    place: Place
    n_lines: int
    compiled: jinja2.Template


def template_names() -> list[str]:
    """The names of the templates that come with the package."""
    files = resources.files("rgsd.prompts").joinpath("templates").iterdir()
    return sorted(f.name.removesuffix(".jinja") for f in files if f.name.endswith(".jinja"))


def template_source(template: str) -> str:
    """A template's text, e.g. for a run's folder to keep.

    Args:
        template: a name, or a path that ends in .jinja or .txt.

    Raises:
        ConfigError: when there is no such template, or the file cannot be read as UTF-8.
    """
    if not isinstance(template, str) or not template:
        raise ConfigError(f"template must be a name or a path, got {template!r}: try 'paper'")
    if template.endswith((".jinja", ".txt")):
        return _file_text(template)
    names = template_names()
    if template not in names:
        raise ConfigError(
            f"unknown template {template!r}: use one of {', '.join(names)}, or the path of a file of your own, "
            "ending in .jinja or .txt"
        )
    return resources.files("rgsd.prompts").joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")


def _file_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"template {path!r} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"template {path!r} is not UTF-8 ({error.reason}): save it as UTF-8") from error


def _load(template: str) -> _Template:
    # Read anew each time, for a file may change; compiled once a text.
    return _compile(template_source(template), template)


@lru_cache(maxsize=64)
def _compile(source: str, where: str) -> _Template:
    # Trailing white space would otherwise end every prompt.
    source = source.rstrip()
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    try:
        tree = environment.parse(source, where, where)
        _check_names(tree, where)
        code = environment.compile(source, where, where)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: {error.message}. Mend it: {_HELP}") from error
    compiled = environment.template_class.from_code(environment, code, environment.make_globals(None))
    return _Template(where, _place(source, where), source.count("\n") + 1, compiled)


def _check_names(tree: nodes.Template, where: str) -> None:
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise ConfigError(
            f"{where}, line {node.lineno}: a template cannot load another one: write its text in this file"
        )
    unknown = meta.find_undeclared_variables(tree) - set(VARIABLES)
    for node in tree.find_all(nodes.Name):
        if node.name in unknown:
            raise ConfigError(f"{where}, line {node.lineno}: unknown variable {node.name!r}: {_HELP}")


def _place(source: str, where: str) -> Place:
    remedy = "begin the file with {# place: user #} or {# place: system #}, or leave the comment out for user"
    match = _PLACE.match(source)
    if match and match[1] == "user":
        return "user"
    if match and match[1] == "system":
        return "system"
    misplaced = match or _PLACE_ANYWHERE.search(source)
    if misplaced:
        line = source.count("\n", 0, source.index("{#", misplaced.start())) + 1
        got = repr(match[1]) if match else "a malformed place comment, or one that is not first in the file"
        raise ConfigError(f"{where}, line {line}: got {got}: {remedy}")
    return "user"


def _shown_criteria(rubric: Rubric, show_weights: bool) -> list[ShownCriterion]:
    return [_shown(number, criterion, show_weights) for number, criterion in enumerate(rubric, 1)]


def _shown(number: int, criterion: Criterion, show_weights: bool) -> ShownCriterion:
    text = criterion.text.strip()
    mark = f" [weight={criterion.weight:.10g}]" if show_weights else ""
    lead = f"{number}. "
    line = lead + (PITFALL_PREFIX if criterion.is_pitfall else "") + text + mark
    # A criterion of several lines stays one entry of the list.
    line = line.replace("\n", "\n" + " " * len(lead))
    return ShownCriterion(
        text, criterion.weight, criterion.is_pitfall, criterion.title, tuple(criterion.tags), mark, line
    )


def _render(
    template: _Template, settings: PromptSettings, question: str, rubric: Rubric | None, reference: str | None, of: str
) -> str:
    criteria = [] if rubric is None else _shown_criteria(rubric, settings.show_weights)
    try:
        rendered = template.compiled.render(
            question=question, criteria=criteria, rubric="\n".join(c.line for c in criteria), reference=reference
        )
    except _RENDER_ERRORS as error:
        at = _error_line(error, template)
        raise ConfigError(f"{template.where}, line {at}: {error}, on {of}. Mend it: {_HELP}") from error
    _check_shown(template, settings, rendered, question, criteria, reference, of)
    return rendered


def _error_line(error: Exception, template: _Template) -> int:
    line, trace = 1, error.__traceback__
    while trace is not None:
        # jinja rewrites the frames of a template to its file name and its lines.
        if trace.tb_frame.f_code.co_filename == template.where:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _check_shown(
    template: _Template,
    settings: PromptSettings,
    rendered: str,
    question: str,
    criteria: Sequence[ShownCriterion],
    reference: str | None,
    of: str,
) -> None:
    """Refuse a prompt that leaves out what the teacher is to be shown, which would train on nothing, silently."""
    text = _folded(rendered)
    shown = settings.privileged_context
    where = f"{template.where}, lines 1-{template.n_lines}: on {of}, with privileged_context {shown!r}, "
    if template.place == "user" and _folded(question) not in text:
        raise ConfigError(
            where + "the question is not in the rendered text, which replaces the user's turn: "
            "add {{ question }}, unchanged, or begin the file with {# place: system #}"
        )
    if criteria and not any(_folded(part) in text for c in criteria for part in (c.text, c.title) if part):
        raise ConfigError(where + "no criterion is in the rendered text: add {{ rubric }}, or a loop over criteria")
    if reference is not None and _folded(reference) not in text:
        raise ConfigError(where + "the reference is not in the rendered text: add {{ reference }}, unchanged")


def _folded(text: str) -> str:
    """Text with case and white space folded, so that a template may indent, wrap or capitalise."""
    return " ".join(text.split()).casefold()


_PROBE_QUESTION = "Probe question?"
_PROBE_REFERENCE = "Probe reference."
_PROBE_RUBRIC = Rubric(
    (
        Criterion("Probe criterion one.", 5.0, "Probe title one"),
        Criterion("Probe criterion two.", 1.0, "Probe title two"),
        Criterion("Probe pitfall.", -5.0, "Probe title three"),
    )
)


def _check_template(settings: PromptSettings) -> None:
    """Render a probe, so that a template that cannot serve the privileged_context fails before any work is done."""
    template = _load(settings.template)
    if settings.privileged_context == "none":
        return
    rubric = _PROBE_RUBRIC if settings.privileged_context in SHOWS_RUBRIC else None
    reference = _PROBE_REFERENCE if settings.privileged_context in SHOWS_REFERENCE else None
    _render(template, settings, _PROBE_QUESTION, rubric, reference, of="a made-up example")


# --- The derangement ------------------------------------------------------------------------------------------------


def derangement(examples: Sequence[Example], seed: int) -> list[int]:
    """For each example, the index of the example whose rubric it is shown: the mismatched control.

    Every rubric is used exactly once, and none by its own prompt, by another copy of that prompt (see
    `Example.prompt_key`), or by an example with the same criteria. The result depends on the examples, their order and
    the seed only. Time is linear but for one sort.

    Examples of the same prompt or the same criteria are tied into groups, and ties chain; a group of at most half the
    examples can always be moved off itself.

    Raises:
        ConfigError: when there are fewer than two examples, the seed is not a whole number of 0 or more, or more than
            half of the examples are tied together.
    """
    if not _is_whole(seed, at_least=0):
        raise ConfigError(f"seed must be a whole number of 0 or more, got {seed!r}")
    n = len(examples)
    if n < 2:
        raise ConfigError(f"a mismatched rubric needs another prompt: got {n} example(s), 2 or more are wanted")
    groups = _tied(examples)
    largest = max(len(group) for group in groups)
    if 2 * largest > n:
        tied = next(group for group in groups if len(group) == largest)
        raise ConfigError(
            f"{largest} of {n} examples share their prompt or their criteria, so not every one of them can be shown "
            f"another's rubric (first: {_listed([examples[i].id for i in tied])}): remove the copies, or add examples"
        )
    rng = random.Random(seed)
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    order = [i for group in groups for i in group]
    # Groups lie in one piece each, so a step as long as the largest leads out of every one of them.
    chosen = [0] * n
    for at, i in enumerate(order):
        chosen[i] = order[(at + largest) % n]
    return chosen


def _tied(examples: Sequence[Example]) -> list[list[int]]:
    """Indices grouped by the same prompt or the same criteria, in order of first appearance."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, ...], int] = {}
    for i, example in enumerate(examples):
        for key in (("prompt", example.prompt_key), ("criteria", *_criteria_key(example.rubric))):
            # The earlier root leads, so that a group's root is its first index.
            a, b = sorted((root(i), root(first.setdefault(key, i))))
            parent[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(examples)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _criteria_key(rubric: Rubric) -> Iterable[str]:
    return sorted(_folded(c.text) for c in rubric)
