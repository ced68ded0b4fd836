"""A supervised warm start: a small base model first learns to follow a rubric that it is shown.

RGSD needs a base policy whose responses change when it sees the rubric (the conditioning gap). A model of 135M
parameters copies the rubric instead. From examples that have both reference responses and programmatic checks, this
module makes pairs that teach it: some criteria are shown, and the target is the reference without the sentences that
meet the others. The prompt alone gets the reference without the recurring ones, so that the warm-started model, the
base policy of the run that follows, does not do unasked what the rubric would ask for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rgsd.errors import CheckUndecided, ConfigError
from rgsd.judges.checks import holds
from rgsd.progress import say
from rgsd.prompts.messages import PromptSettings, student_messages, teacher_messages
from rgsd.rubrics import Criterion, Example, Rubric
from rgsd.runs import ADAPTER, MODEL, Run, create_run


@dataclass
class WarmStartConfig:
    """How the pairs are made, and where the run may go."""

    template: str = field(default="cover", metadata={"help": "Teacher prompt of the pairs: a template's name or file."})
    pairs_per_example: int = field(default=3, metadata={"help": "Random choices of criteria an example gives."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a run that the output_dir already holds."})


N_DRAWS = 5
"""How often criteria are drawn anew for a pair until the target follows them."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def without(text: str, criteria: Sequence[Criterion], kept: Sequence[Criterion] = ()) -> str:
    """The text less the sentences that meet one of the criteria and none of the kept ones.

    Where bullets are the criterion, they become sentences. An opening that is asked for, such as "In short", is cut off
    a first sentence that is kept.
    """
    for criterion in criteria:
        if criterion.check is None or not holds(criterion.check, text):
            continue
        if "count" in criterion.check:
            text = re.sub(r"^[ \t]*[-*][ \t]+", "", text, flags=re.MULTILINE)
            continue
        pieces = _split(text)
        # A negative check ("leaves no term unexplained") holds on every sentence: nothing to leave out.
        guilty = [holds(criterion.check, p) and not any(_holds_alone(k, p) for k in kept) for p, _ in pieces]
        if all(guilty):
            continue
        text = "".join(piece + gap for (piece, gap), out in zip(pieces, guilty, strict=True) if not out)
        text = _without_opening(text, criterion)
    return text.strip()


def _without_opening(text: str, criterion: Criterion) -> str:
    """The text less the opening words that a `{"starts": {"regex": ...}}` criterion asks for."""
    pattern = (criterion.check or {}).get("starts", {}).get("regex")
    if pattern is None or not (found := re.match(pattern, text, re.IGNORECASE)):
        return text
    rest = text[found.end() :].lstrip(" ,:;-")
    return rest[:1].upper() + rest[1:]


def _holds_alone(criterion: Criterion, piece: str) -> bool:
    """Whether the sentence is what meets the criterion: checks that hold on nothing at all do not count."""
    return criterion.check is not None and holds(criterion.check, piece) and not holds(criterion.check, "")


def _split(text: str) -> list[tuple[str, str]]:
    """Sentences, each with the white space that follows it."""
    pieces, start = [], 0
    for match in _SENTENCE.finditer(text):
        pieces.append((text[start : match.start()], match.group()))
        start = match.end()
    return [*pieces, (text[start:], "")] if start < len(text) else pieces


def pairs(
    examples: Sequence[Example], settings: PromptSettings, *, per_example: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of {"prompt", "completion"} messages: up to `per_example` random choices of criteria, and the prompt alone.

    Args:
        examples: with references, and checks on their criteria; others are left out.
        settings: the teacher's template.
        per_example: how many choices of criteria are drawn. The target follows what is shown, or there is no row.
        seed: of the choices.
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
    """The rows of one example that has a reference and checks."""
    reference = example.reference or ""
    rows = []
    wanted = [c for c in example.rubric if not c.is_pitfall]
    for _ in range(per_example):
        for _ in range(N_DRAWS):
            shown = rng.sample(wanted, rng.randint(1, len(wanted)))
            target = without(reference, [c for c in wanted if c not in shown], shown)
            # A target that lacks what is shown (bullets, with one point left) teaches to ignore the rubric.
            if len(target.split()) >= 5 and all(c.check and holds(c.check, target) for c in shown):
                kept = [c for c in example.rubric if c in shown or c.is_pitfall]
                rows.append(_row(teacher_messages(example, settings, shown=Rubric(tuple(kept))), target))
                break
    own = [c for c in wanted if "own" in c.tags]
    recurring = [c for c in wanted if "own" not in c.tags]
    openings = [c for c in recurring if c.check and "starts" in c.check]
    bare = without(without(reference, openings, own), recurring)
    if len(bare.split()) >= 5:
        rows.append(_row(student_messages(example), bare))
    return rows


def _row(prompt: list[dict[str, str]], target: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": target}]}


def warm_start(training: Any, model_config: Any, data: Any, settings: WarmStartConfig) -> Run:
    """Train with TRL's SFTTrainer on the pairs of the training examples, and write a run folder.

    Args:
        training: a `trl.SFTConfig`.
        model_config: a `trl.ModelConfig`.
        data: a `rgsd.data.config.DataConfig`; its held-out examples are not used.
        settings: how the pairs are made.

    Raises:
        ConfigError: when the data have no references or no checks to make pairs of.
    """
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from rgsd import models
    from rgsd.data.config import load_split
    from rgsd.models.adapters import saved_without_the_hub

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
    for key in (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "seed",
    ):
        flat[key] = getattr(training, key)
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
