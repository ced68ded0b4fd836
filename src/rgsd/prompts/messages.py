"""Turns an example into the chat messages that the student and the teacher read. Knows no tokenizer and no model.

The student reads the prompt. The teacher, which is the same base policy, also reads a privileged context: the rubric
(arXiv 2606.12507, figure 10), a reference response, or both. Two controls show it another prompt's rubric or nothing. A
template words the privileged context: a bundled one in `rgsd/prompts/templates/`, or your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rgsd.errors import ConfigError
from rgsd.prompts.mismatched import derangement, is_whole, listed
from rgsd.prompts.rendering import Place, load_template, render
from rgsd.rubrics import Criterion, Example, Rubric

ChatMessages = list[dict[str, str]]
"""A conversation in the form chat templates take: [{"role": ..., "content": ...}, ...]."""

PrivilegedContext = Literal["rubric", "reference", "both", "mismatched", "none"]
"""What the teacher reads besides the prompt. "mismatched" and "none" are controls."""

PRIVILEGED_CONTEXTS: tuple[str, ...] = get_args(PrivilegedContext)
SHOWS_RUBRIC = frozenset({"rubric", "both", "mismatched"})
SHOWS_REFERENCE = frozenset({"reference", "both"})


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
        if self.max_criteria is not None and not is_whole(self.max_criteria, at_least=1):
            raise ConfigError(
                f"max_criteria must be a whole number of 1 or more, or none for all, got {self.max_criteria!r}"
            )
        if not is_whole(self.seed, at_least=0):
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
    template = load_template(settings.template)
    question = example.messages[-1]["content"]
    rendered = render(
        template,
        question,
        rubric,
        text,
        show_weights=settings.show_weights,
        privileged_context=settings.privileged_context,
        where=f"example {example.id!r}",
    )
    return _placed(example, template.place, rendered)


def training_rows(
    examples: Sequence[Example],
    settings: PromptSettings,
    references: Mapping[str, str] | None = None,
    *,
    with_contrast: bool = False,
) -> list[dict[str, Any]]:
    """One row per example: {"example_id": id, "prompt": student's messages, "teacher_prompt": teacher's messages}.

    Args:
        examples: The training set, in order.
        settings: Settings of the teacher's prompts.
        references: Example id -> reference response, e.g. written by the base model before training. If given, the
            examples' own references are ignored: a run never mixes the two.
        with_contrast: Add "contrast_prompt", the teacher's messages of the mismatched control.

    Raises:
        ConfigError: As `teacher_messages`; if references are missing (counted, with the first ids); if "mismatched"
            has no derangement.
    """
    if with_contrast:
        rows = training_rows(examples, settings, references)
        contrasts = teacher_prompts(examples, replace(settings, privileged_context="mismatched"))
        return [row | {"contrast_prompt": prompt} for row, prompt in zip(rows, contrasts, strict=True)]
    given = [e.reference if references is None else references.get(e.id) for e in examples]
    if settings.privileged_context in SHOWS_REFERENCE:
        # All at once: finding them one by one would take a run for each.
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


def _missing_references(ids: Sequence[str], settings: PromptSettings) -> str:
    return (
        f"privileged_context {settings.privileged_context!r} needs a reference response per example, and {len(ids)} "
        f"have none: {listed(ids)}. Let the base model write them (self_written_references), remove "
        "these examples, or use privileged_context 'rubric'"
    )


def _no_tagged_criterion(ids: Sequence[str], settings: PromptSettings) -> str:
    return (
        f"{len(ids)} examples have no criterion with any of the tags {', '.join(settings.criteria_tags)}: "
        f"{listed(ids)}. Remove these examples or change criteria_tags"
    )


def _placed(example: Example, place: Place, text: str) -> ChatMessages:
    messages = student_messages(example)
    if place == "user":
        messages[-1]["content"] = text
        return messages
    for message in messages:
        # Models expect at most one system turn, so an existing one is extended.
        if message["role"] in ("system", "developer"):
            message["content"] = f"{message['content']}\n\n{text}" if message["content"].strip() else text
            return messages
    return [{"role": "system", "content": text}, *messages]


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
    """Render a made-up example, so that an unsuitable template fails before any work is done."""
    template = load_template(settings.template)
    if settings.privileged_context == "none":
        return
    rubric = _PROBE_RUBRIC if settings.privileged_context in SHOWS_RUBRIC else None
    reference = _PROBE_REFERENCE if settings.privileged_context in SHOWS_REFERENCE else None
    render(
        template,
        _PROBE_QUESTION,
        rubric,
        reference,
        show_weights=settings.show_weights,
        privileged_context=settings.privileged_context,
        where="a made-up example",
    )
