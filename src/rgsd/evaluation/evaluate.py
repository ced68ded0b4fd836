"""`rgsd eval`: models, runs and servers on the same prompts, under the same judge, in one resumable run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgsd import data as rubric_data
from rgsd.data.config import DataConfig, load, load_by_id, load_split
from rgsd.errors import ConfigError, RGSDError, RunError
from rgsd.evaluation.arms import check_coverage, evaluate_arm
from rgsd.evaluation.config import MeasureConfig
from rgsd.evaluation.policies import policy_generator
from rgsd.evaluation.responses import THINK_TAGS, references, stored_responses, think_tags_of
from rgsd.evaluation.run_ref import RunRef
from rgsd.evaluation.samples import Sample
from rgsd.evaluation.summaries import results
from rgsd.judges import JudgeConfig, build_judge, check_judgeable, try_out
from rgsd.progress import say
from rgsd.prompts.messages import SHOWS_REFERENCE, PromptSettings, teacher_prompts
from rgsd.redaction import without_credentials
from rgsd.rubrics import Example, fingerprint
from rgsd.runs import (
    BASELINE,
    CANDIDATE,
    CONFIG,
    RECORD,
    RESULTS,
    TRAINED,
    Run,
    conditioned_role,
    create_run,
    open_run,
)


def evaluate_models(
    names: Sequence[str],
    data: DataConfig,
    judge_config: JudgeConfig,
    settings: MeasureConfig,
    *,
    on_all: bool | None = None,
) -> Run:
    """Evaluate every model on the same prompts with the same judge; write the samples and the table.

    Args:
        names: As `RunRef.parse_policy` reads them. The others are compared with the first.
        data: The rubric data. If a run is named and this is at its defaults, the run's data and held-out prompts.
        judge_config: The judge.
        settings: Everything else.
        on_all: Whether to use all prompts of the data, or the held-out ones. None: the held-out ones of a run and of
            data with `held_out_tags`, otherwise all.

    Raises:
        RGSDError: If the evaluation cannot start. `JudgeError` if the judge cannot continue, or its coverage is too
            low. The run keeps what was generated and judged, and the same command continues.
    """
    refs = [RunRef.parse_policy(name) for name in names]
    arms = dict(zip(_arm_names(refs), refs, strict=True))
    first_run = next((r.source for r in refs if r.is_run), None)
    if first_run and data == DataConfig():
        data = data_of(open_run(first_run))
        on_all = False if on_all is None else on_all
    examples = examples_for(data, settings, on_all)
    judge = build_judge(judge_config)
    check_judgeable(examples, judge_config)
    settings = with_tags_of(refs, settings)
    run = open_evaluation(names, data, judge_config, settings)
    run.note(kind="eval", roles=_roles(arms), held_out_fingerprint=fingerprint(examples), judge=judge.name)
    say(f"Measuring {', '.join(arms)} on {len(examples)} prompts, judge: {judge.name}")
    samples: dict[str, list[Sample]] = {}
    try:
        stored = [stored_responses(run, arm) for arm in arms]
        try_out(judge, lazily=all(e.id in responses for responses in stored for e in examples))
        for policy, members in _by_policy(arms).items():
            generator = policy_generator(policy, settings)
            for arm, ref in members:
                prompts = prompts_for(
                    ref.privileged_context, examples, settings, _references(ref, examples, settings, run)
                )
                samples[arm] = evaluate_arm(
                    run, arm, examples, prompts, generator, judge, think_tags=settings.think_tags
                )
            del generator  # frees its model before the next one is loaded
    except (RGSDError, KeyboardInterrupt):
        if run.waiting is not None or run.replaced is not None:
            run.discard()
            raise
        run.note(status="stopped")
        say(f"What was generated and judged is in {run.folder}; the same command continues from there.")
        raise
    samples = {arm: samples[arm] for arm in arms}
    run.write(RESULTS, results(samples, run, settings.seed, judge=judge.name, baseline=next(iter(arms))))
    run.note(status="finished")
    for arm_samples in samples.values():
        check_coverage(arm_samples, settings.min_coverage)
    return run


def with_tags_of(refs: Sequence[RunRef], settings: MeasureConfig) -> MeasureConfig:
    """The settings with the think tags of the runs that are named, unless the settings have tags of their own.

    Raises:
        ConfigError: If the runs' tags differ.
    """
    if settings.think_tags != THINK_TAGS:
        return settings
    by_tags = {think_tags_of(open_run(r.source)): r.source for r in refs if r.is_run}
    if len(by_tags) > 1:
        listed = ", ".join(f"{source}: {' '.join(tags)}" for tags, source in by_tags.items())
        raise ConfigError(f"the runs reason between different tags ({listed}): evaluate each in a command of its own")
    for opening, closing in by_tags:
        settings = dataclasses.replace(settings, think_open_tag=opening, think_close_tag=closing)
    return settings


def _arm_names(refs: Sequence[RunRef]) -> list[str]:
    """The names of the arms; those of equal names get their source in front."""
    names = [r.policy_arm for r in refs]
    return [
        name if names.count(name) == 1 else f"{Path(r.source).name}:{name}" if r.is_run else r.source
        for r, name in zip(refs, names, strict=True)
    ]


def _roles(arms: Mapping[str, RunRef]) -> dict[str, str]:
    """The role of each arm. The first of several is the baseline of the others."""
    roles = {}
    for arm, ref in arms.items():
        if ref.privileged_context != "none":
            roles[arm] = conditioned_role(ref.privileged_context)
        elif ref.is_run and not ref.is_base:
            roles[arm] = TRAINED
        else:
            roles[arm] = BASELINE if len(arms) == 1 else CANDIDATE
    return roles | ({next(iter(arms)): BASELINE} if len(arms) > 1 else {})


def _by_policy(arms: Mapping[str, RunRef]) -> dict[RunRef, list[tuple[str, RunRef]]]:
    """Arms of the same weights together, so the weights are loaded once."""
    groups: dict[RunRef, list[tuple[str, RunRef]]] = {}
    for arm, ref in arms.items():
        groups.setdefault(dataclasses.replace(ref, privileged_context="none"), []).append((arm, ref))
    return groups


def prompts_for(
    privileged_context: str,
    examples: Sequence[Example],
    settings: MeasureConfig,
    references: Mapping[str, str] | None = None,
) -> list[list[dict[str, str]]]:
    """The prompts of a model that sees this privileged context. `references` replace the examples' own."""
    shown = PromptSettings(
        template=settings.template,
        show_weights=settings.show_weights,
        privileged_context=privileged_context,  # pyright: ignore[reportArgumentType]
        seed=settings.seed,
    )
    return teacher_prompts(examples, shown, references)


def _references(ref: RunRef, examples: Sequence[Example], settings: MeasureConfig, run: Run) -> dict[str, str] | None:
    """The self-written references of a run that was trained with them; its base writes those of other prompts. None if
    the examples' own references are shown, or none."""
    if not ref.is_run or ref.privileged_context not in SHOWS_REFERENCE:
        return None
    source = open_run(ref.source)
    if not source.settings.get("self_written_references"):
        return None
    tags = think_tags_of(source)
    as_trained = dataclasses.replace(
        settings,
        backend="transformers",
        api_base=None,
        max_new_tokens=source.settings.get("max_completion_length") or 512,
        chat_template_kwargs=source.settings.get("chat_template_kwargs"),
        temperature=0.0,
        think_open_tag=tags[0],
        think_close_tag=tags[1],
    )
    base = policy_generator(RunRef(ref.source, "base"), as_trained)
    return references(run, examples, base, think_tags=tags, also=source)


# --- The data and the folder of an evaluation -----------------------------------------------------------------------


def data_of(run: Run) -> DataConfig:
    """The data settings of a run."""
    names = {f.name for f in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: value for name, value in run.settings.items() if name in names})


def examples_by_id(run: Run) -> dict[str, Example]:
    """All examples of the data that a run was trained or evaluated on."""
    return load_by_id(data_of(run))


def examples_for(data: DataConfig, settings: MeasureConfig, on_all: bool | None) -> list[Example]:
    """The examples of an evaluation; `on_all` as in `evaluate_models`.

    Raises:
        ConfigError: If there are none.
    """
    if on_all is None:
        on_all = not data.held_out_tags
    if on_all:
        examples = list(rubric_data.deduplicate(load(data).examples).examples)
    else:
        examples = load_split(data).held_out
    if not examples:
        raise ConfigError(f"{data.data!r} has no prompts to evaluate on: check data, held_out and held_out_tags")
    return rubric_data.subset(examples, settings.max_prompts, data.split_seed)


_JUDGE_COSTS = frozenset(
    {f.name for f in dataclasses.fields(JudgeConfig)}
    - {"judge", "judge_kwargs", "judge_mode", "judge_strictness", "judge_temperature", "judge_max_tokens",
       "judge_reasoning_effort", "judge_structured", "judge_sample"}
)  # fmt: skip
"""Settings of the judge that change what it costs, not what it says."""
_MAY_DIFFER = frozenset(
    {*_JUDGE_COSTS, "output_dir", "overwrite", "min_coverage", "batch_size", "concurrency", "timeout", "api_key_env"}
)
"""Settings that may change when an evaluation continues."""


def open_evaluation(
    names: Sequence[str],
    data: DataConfig,
    judge: JudgeConfig,
    settings: MeasureConfig,
    more: Mapping[str, Any] | None = None,
) -> Run:
    """Open the run folder of an evaluation: a new one, or the one that the same settings began.

    Raises:
        RunError: If the folder holds an evaluation whose settings would give other samples.
    """
    flat: dict[str, Any] = {"models": list(names), **(more or {})}
    for part in (data, judge, settings):
        flat |= dataclasses.asdict(part)
    flat = without_credentials(flat)  # as it is stored, to compare it with what is stored
    name = Path(RunRef.parse_policy(names[0]).source).name
    folder = settings.output_dir or f"runs/{'gap' if more else 'eval'}-{name}"
    continues = (Path(folder) / RECORD).is_file() and not settings.overwrite
    if continues and (changed := _changed(open_run(folder).settings, flat)):
        raise RunError(
            f"{folder} holds an evaluation with other settings ({', '.join(changed)}; see its {CONFIG}): choose "
            "another --output_dir, or replace it with --overwrite"
        )
    return create_run(folder, flat, overwrite=settings.overwrite, resume=continues)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ and decide the samples. More models on the same prompts are no change."""
    names = sorted(
        name
        for name in before.keys() | now.keys()
        if name not in _MAY_DIFFER and _as_list(before.get(name)) != _as_list(now.get(name))
    )
    return [n for n in names if not (n == "models" and set(before.get(n) or ()) <= set(now["models"]))]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
