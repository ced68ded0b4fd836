"""Stored responses: what a run's models wrote, with the key of what each response depends on.

A stored response counts only if the same weights, settings and prompt would produce it again. Responses of any other
key are moved to set-aside.jsonl, together with their samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgsd.errors import ConfigError
from rgsd.evaluation.samples import Sample
from rgsd.inference import Conversation, Generator, Response, ResponseKey
from rgsd.progress import counting, say
from rgsd.prompts.messages import reference_request
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, strip_thinking
from rgsd.rows import Fields, check, is_count, is_flag, is_object, is_text
from rgsd.rubrics import Example
from rgsd.runs import REFERENCES, RESPONSES, SAMPLES, SET_ASIDE, Run

THINK_TAGS = (OPEN_TAG, CLOSE_TAG)
_RESPONSE: Fields = {
    "arm": (is_text, False),
    "example_id": (is_text, True),
    "text": (is_text, True),
    "n_tokens": (is_count, True),
    "is_truncated": (is_flag, True),
    "starts_in_thinking": (is_flag, True),
    "key": (is_object, False),
}


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A line of responses.jsonl or references.jsonl.

    Args:
        example_id: The example.
        response: The response to it.
        key: What it depends on, as `ResponseKey`; None when the line does not say.
        arm: The arm that responded; empty for references.
    """

    example_id: str
    response: Response
    key: Mapping[str, str] | None
    arm: str = ""

    def to_row(self) -> dict[str, Any]:
        """The line."""
        arm = {"arm": self.arm} if self.arm else {}
        return {**arm, "example_id": self.example_id, **asdict(self.response), "key": self.key}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StoredResponse:
        """Read a line.

        Raises:
            BadRow: If a field is missing or has another type.
        """
        check(row, _RESPONSE)
        response = Response(row["text"], row["n_tokens"], row["is_truncated"], row["starts_in_thinking"])
        return cls(row["example_id"], response, row.get("key"), row.get("arm") or "")


def stored_responses(run: Run, arm: str) -> dict[str, StoredResponse]:
    """The responses of an arm that the run holds, by example.

    Raises:
        RunError: If a line is not a response; it names the file and the line.
    """
    return {r.example_id: r for r in run.iterate_lines(RESPONSES, StoredResponse.from_row) if r.arm == arm}


def respond(
    run: Run, arm: str, examples: Sequence[Example], prompts: Sequence[Conversation], generator: Generator
) -> dict[str, StoredResponse]:
    """The responses of an arm by example. Generates those that the run does not hold, and stores each on arrival."""
    keys = dict(zip((e.id for e in examples), generator.keys(prompts), strict=True))
    set_aside_stale(run, arm, keys)
    stored = stored_responses(run, arm)
    missing = [i for i, example in enumerate(examples) if example.id not in stored]
    if missing:
        with counting(f"{arm}: responses", len(missing)) as counter:

            def store(i: int, response: Response) -> None:
                example_id = examples[missing[i]].id
                stored[example_id] = StoredResponse(example_id, response, asdict(keys[example_id]), arm)
                run.append(RESPONSES, [stored[example_id].to_row()])
                counter.advance()

            generator.generate([prompts[i] for i in missing], done=store)
    return stored


def set_aside_stale(run: Run, arm: str, keys: Mapping[str, ResponseKey], reason: str = "") -> None:
    """Move an arm's responses and samples that no longer count to set-aside.jsonl, and report their number.

    Args:
        run: The run.
        arm: The arm.
        keys: The keys of the responses that count, by example. All others of this arm are stale.
        reason: Why they do not count. By default each response's key says it.
    """
    current = {i: asdict(key) for i, key in keys.items()}

    def is_stale(example_id: str, key: Mapping[str, str] | None) -> bool:
        return example_id not in current or key != current[example_id]

    responses = [r for r in stored_responses(run, arm).values() if is_stale(r.example_id, r.key)]
    samples = [
        s
        for s in run.iterate_lines(SAMPLES, Sample.from_row)
        if s.arm == arm and is_stale(s.example_id, s.response_key)
    ]
    if not responses and not samples:
        return
    why = Counter(reason or _reason(r.key, current.get(r.example_id)) for r in responses)
    why = why or Counter(reason or _reason(s.response_key, current.get(s.example_id)) for s in samples)
    # Samples first: a kill between the two never leaves a sample without its response.
    n_samples = run.set_aside(
        SAMPLES, lambda row: row["arm"] == arm and is_stale(row["example_id"], row.get("response_key"))
    )
    n_responses = run.set_aside(
        RESPONSES, lambda row: row["arm"] == arm and is_stale(row["example_id"], row.get("key"))
    )
    say(
        f"{arm}: set aside {n_responses} stored responses and {n_samples} samples (in {SET_ASIDE}): "
        + ", ".join(f"{n} {each}" for each, n in why.most_common())
    )


def _reason(key: Mapping[str, str] | None, current: Mapping[str, str] | None) -> str:
    """Why a stored response does not count."""
    if current is None:
        return "to prompts that are not evaluated"
    if key is None:
        return "of unknown origin"
    for part, reason in (("weights", "of other weights"), ("settings", "with other generation settings")):
        if key.get(part) != current[part]:
            return reason
    return "to another prompt"


def judged_text(response: Response, think_tags: tuple[str, str] = THINK_TAGS) -> str:
    """The response without its reasoning; empty if it never leaves its reasoning."""
    return strip_thinking(response.text, *think_tags, starts_in_thinking=response.starts_in_thinking)


# --- References that the base model writes from the rubrics ---------------------------------------------------------


def references(
    run: Run,
    examples: Sequence[Example],
    generator: Generator,
    *,
    think_tags: tuple[str, str] = THINK_TAGS,
    also: Run | None = None,
    keep: bool = True,
) -> dict[str, str]:
    """References that a base model writes from the rubrics, by example, without its reasoning.

    Args:
        run: Keeps them in references.jsonl. Those of the same weights, settings and prompt are used again.
        examples: What to write references for.
        generator: The base model.
        think_tags: Tags of the reasoning.
        also: Another run. Its references are used as well if the same weights wrote them from the same prompt.
        keep: Whether this process stores them in the run.

    Raises:
        ConfigError: If an answer is empty, for example because the reasoning took all tokens.
    """
    prompts = [reference_request(e) for e in examples]
    keys = dict(zip((e.id for e in examples), generator.keys(prompts), strict=True))
    written = _usable_references(run, also, keys)
    missing = [i for i, e in enumerate(examples) if e.id not in written]
    if missing:
        with counting("self-written references", len(missing)) as counter:

            def store(i: int, response: Response) -> None:
                example_id = examples[missing[i]].id
                written[example_id] = response
                if keep:
                    row = StoredResponse(example_id, response, asdict(keys[example_id])).to_row()
                    run.append(REFERENCES, [row])
                counter.advance()

            generator.generate([prompts[i] for i in missing], done=store)
    texts = {e.id: judged_text(written[e.id], think_tags).strip() for e in examples}
    if empty := [i for i, text in texts.items() if not text]:
        n_cut = sum(written[i].is_truncated for i in empty)
        raise ConfigError(
            f"the base model wrote {len(empty)} of {len(examples)} references without an answer (first: "
            f"{', '.join(empty[:5])}); {n_cut} of them were cut off before it. Raise max_completion_length, or remove "
            "those prompts"
        )
    return texts


def _usable_references(run: Run, also: Run | None, keys: Mapping[str, ResponseKey]) -> dict[str, Response]:
    """The stored references of the same weights and prompt: the run's own need the same settings too, and win."""
    usable: dict[str, Response] = {}
    for source in (also, run):
        for stored in source.iterate_lines(REFERENCES, StoredResponse.from_row) if source else ():
            key, other = keys.get(stored.example_id), stored.key or {}
            if key is None or any(other.get(part) != getattr(key, part) for part in ("weights", "prompt")):
                continue
            if other.get("settings") == key.settings or (also is not None and stored.example_id not in usable):
                usable[stored.example_id] = stored.response
    return usable


def stored_references(run: Run) -> dict[str, str]:
    """The self-written references of a run, by example, without their reasoning."""
    stored = run.iterate_lines(REFERENCES, StoredResponse.from_row)
    return {r.example_id: judged_text(r.response, think_tags_of(run)).strip() for r in stored}


def think_tags_of(run: Run) -> tuple[str, str]:
    """The tags of the reasoning that a run was trained or measured with."""
    return run.settings.get("think_open_tag") or OPEN_TAG, run.settings.get("think_close_tag") or CLOSE_TAG
