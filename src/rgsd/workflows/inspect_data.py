"""`rgsd data`: what a rubric file holds, and one example as the student and the teacher read it."""

from __future__ import annotations

from dataclasses import dataclass

from rgsd import data as rubric_data
from rgsd.prompts.messages import PromptSettings, student_messages, teacher_messages
from rgsd.settings import setting


@dataclass
class InspectConfig:
    """How a rubric file is read and which example is shown."""

    schema: str | None = setting(
        None, "Schema of the data. Unset: detected from the rows.", choices=sorted(rubric_data.SCHEMAS)
    )
    data_split: str | None = setting(None, "Split of a hub dataset, e.g. `train`.")
    skip_bad_rows: bool = setting(False, "List invalid rows and skip them instead of stopping.")
    example: str | None = setting(None, "Id of the example to show. Unset: the first.")
    template: str = setting("paper", "Teacher prompt template: paper, cover, system, or a .jinja file.")
    show_weights: bool = setting(False, "Show each criterion's weight to the teacher.")


def inspect_data(path: str, settings: InspectConfig) -> bool:
    """Print the summary of rubric data and one example.

    Returns:
        False if `settings.example` names an id that no example has.

    Raises:
        DataError: If the data cannot be read.
    """
    loaded = rubric_data.load(
        path, schema=settings.schema, split=settings.data_split, skip_bad_rows=settings.skip_bad_rows
    )
    print(rubric_data.describe(loaded))
    example = next((e for e in loaded.examples if settings.example in (None, e.id)), None)
    if example is None:
        print(f"\nNo example has the id {settings.example!r}.")
        return False
    print(f"\nExample {example.id} as the student reads it:")
    _show(student_messages(example))
    print("\nThe same example as the teacher reads it:")
    _show(teacher_messages(example, PromptSettings(template=settings.template, show_weights=settings.show_weights)))
    return True


def _show(messages: list[dict[str, str]]) -> None:
    for message in messages:
        print(f"  [{message['role']}]")
        print("\n".join(f"    {line}" for line in message["content"].splitlines()))
