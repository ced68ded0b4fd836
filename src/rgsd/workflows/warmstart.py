"""A supervised warm start: teach a small base model to follow a rubric in its prompt.

RGSD needs a base policy that responds differently when it sees the rubric (the conditioning gap). A model with 135M
parameters copies the rubric instead. This module builds training pairs from examples that have a reference response
and programmatic checks. In a pair, the prompt shows some of the criteria, and the target is the reference without the
sentences that meet the others. The target of the prompt alone is the reference without the sentences that meet
recurring criteria. Otherwise the warm-started model would meet those criteria unasked, and RGSD could gain nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgsd.errors import CheckUndecided, ConfigError
from rgsd.progress import say
from rgsd.prompts.messages import PromptSettings, student_messages, teacher_messages
from rgsd.rubrics import Criterion, Example, Rubric
from rgsd.rubrics.checks import holds
from rgsd.runs import ADAPTER, MODEL, Run, create_run
from rgsd.settings import setting

_RECORDED = (
    "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
"""TRL's settings that config.yaml of the warm start holds."""


@dataclass
class WarmStartConfig:
    """How the pairs are built, and whether a run may be replaced."""

    template: str = setting("cover", "Teacher prompt template of the pairs: a name or a .jinja file.")
    pairs_per_example: int = setting(3, "Random selections of criteria per example.")
    overwrite: bool = setting(False, "Replace the run that output_dir holds.")


N_DRAWS = 5
"""Most selections of criteria to try for a pair, until the target meets all that are shown."""
MIN_TARGET_WORDS = 5

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def without(text: str, criteria: Sequence[Criterion], kept: Sequence[Criterion] = ()) -> str:
    """Remove the sentences that meet one of the criteria and none of the kept ones.

    For a criterion about bullets, the markers are removed and the sentences stay. For a criterion about the opening
    words, such as "In short", a first sentence that is kept loses those words.
    """
    for criterion in criteria:
        if criterion.check is None or not holds(criterion.check, text):
            continue
        if "count" in criterion.check:
            text = re.sub(r"^[ \t]*[-*][ \t]+", "", text, flags=re.MULTILINE)
            continue
        pieces = _split(text)
        is_removed = [holds(criterion.check, p) and not any(_holds_alone(k, p) for k in kept) for p, _ in pieces]
        # A negative check ("leaves no term unexplained") holds for every sentence, so there is nothing to remove.
        if all(is_removed):
            continue
        text = "".join(piece + gap for (piece, gap), out in zip(pieces, is_removed, strict=True) if not out)
        text = _without_opening(text, criterion)
    return text.strip()


def _without_opening(text: str, criterion: Criterion) -> str:
    """Remove the opening words that a `{"starts": {"regex": ...}}` criterion asks for."""
    pattern = (criterion.check or {}).get("starts", {}).get("regex")
    if pattern is None or not (opening := re.match(pattern, text, re.IGNORECASE)):
        return text
    rest = text[opening.end() :].lstrip(" ,:;-")
    return rest[:1].upper() + rest[1:]


def _holds_alone(criterion: Criterion, piece: str) -> bool:
    """Whether this sentence meets the criterion. A check that an empty text passes says nothing about a sentence."""
    return criterion.check is not None and holds(criterion.check, piece) and not holds(criterion.check, "")


def _split(text: str) -> list[tuple[str, str]]:
    """Split into sentences, each with the white space that follows it."""
    pieces, start = [], 0
    for match in _SENTENCE.finditer(text):
        pieces.append((text[start : match.start()], match.group()))
        start = match.end()
    return [*pieces, (text[start:], "")] if start < len(text) else pieces


def pairs(
    examples: Sequence[Example], settings: PromptSettings, *, per_example: int, seed: int
) -> list[dict[str, Any]]:
    """Build rows of {"prompt", "completion"} messages.

    Each example yields up to `per_example` rows, each with a random subset of its criteria, and one row with the prompt
    alone.

    Args:
        examples: Those without a reference, or with a criterion without a check, are skipped.
        settings: The teacher's template.
        per_example: Selections of criteria. A selection whose target does not meet all of it gives no row.
        seed: Seed of the selections.
    """
    rng = random.Random(seed)
    rows = []
    for example in examples:
        if example.reference is None or not example.rubric.is_checkable:
            continue
        try:
            rows += _pairs_of(example, settings, per_example, rng)
        except CheckUndecided as error:
            say(f"warmstart: example {example.id!r} gives no pairs: {error}")
    rng.shuffle(rows)
    return rows


def _pairs_of(example: Example, settings: PromptSettings, per_example: int, rng: random.Random) -> list[dict[str, Any]]:
    """Build the rows of one example that has a reference and checks."""
    reference = example.reference or ""
    rows = []
    positive = [c for c in example.rubric if not c.is_pitfall]
    for _ in range(per_example):
        for _ in range(N_DRAWS):
            shown = rng.sample(positive, rng.randint(1, len(positive)))
            target = without(reference, [c for c in positive if c not in shown], shown)
            # A target that fails a criterion in its prompt (bullets, with one bullet left) teaches the model to ignore
            # the rubric.
            if len(target.split()) >= MIN_TARGET_WORDS and all(c.check and holds(c.check, target) for c in shown):
                kept = [c for c in example.rubric if c in shown or c.is_pitfall]
                rows.append(_row(teacher_messages(example, settings, shown=Rubric(tuple(kept))), target))
                break
    own = [c for c in positive if "own" in c.tags]
    recurring = [c for c in positive if "own" not in c.tags]
    openings = [c for c in recurring if c.check and "starts" in c.check]
    bare = without(without(reference, openings, own), recurring)
    if len(bare.split()) >= MIN_TARGET_WORDS:
        rows.append(_row(student_messages(example), bare))
    return rows


def _row(prompt: list[dict[str, str]], target: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": target}]}


def warm_start(training: Any, model_config: Any, data: Any, settings: WarmStartConfig) -> Run:
    """Train with TRL's SFTTrainer on the pairs of the training examples, and write a run folder.

    Args:
        training: A `trl.SFTConfig`.
        model_config: A `trl.ModelConfig`.
        data: A `rgsd.data.config.DataConfig`. Its held-out examples are not used.
        settings: How to build the pairs.

    Raises:
        ConfigError: If no example has both a reference and checks.
    """
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from rgsd import models
    from rgsd.data.config import load_split
    from rgsd.models.adapters import saved_without_the_hub, use_float32_master_weights

    train_set = load_split(data).train
    rows = pairs(
        train_set,
        PromptSettings(template=settings.template),
        per_example=settings.pairs_per_example,
        seed=training.seed,
    )
    if not rows:
        raise ConfigError(
            f"{data.data!r} gives no pairs: a warm start needs examples with a reference response and a programmatic "
            "check on every criterion"
        )
    name = str(model_config.model_name_or_path)
    flat = {**asdict(data), **asdict(settings), "model_name_or_path": name, "dtype": model_config.dtype}
    flat |= {key: getattr(training, key) for key in _RECORDED}
    run = create_run(training.output_dir, flat, overwrite=settings.overwrite)
    try:
        tokenizer = models.load_tokenizer(name, model_config.model_revision)
        model = models.load_model(name, dtype=model_config.dtype, revision=model_config.model_revision)
        run.note(model_fingerprint=models.fingerprint(model), pairs=len(rows))
        trainer = SFTTrainer(
            model,  # pyright: ignore[reportArgumentType]
            args=training,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
        )
        if n := use_float32_master_weights(trainer.model):  # pyright: ignore[reportArgumentType]
            say(f"{n} half-precision parameters are trained in float32")
        run.begin()
        with saved_without_the_hub():
            trainer.train()
    except Exception:
        run.discard()
        raise
    folder = run.folder / (ADAPTER if model_config.use_peft else MODEL)
    with saved_without_the_hub():
        trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    run.note(status="finished")
    return run
