"""`rgsd eval` and `rgsd gap`: models, runs and servers measured on rubric data, in one resumable run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsd import data as rubric_data
from rgsd import models
from rgsd.errors import ConfigError, RGSDError, RunError
from rgsd.evaluation import evaluate
from rgsd.inference import (
    Conversation,
    Done,
    Generator,
    Response,
    ResponseKey,
    SamplingConfig,
    ServerGenerator,
    TransformersGenerator,
    VllmGenerator,
    response_keys,
    tokenize,
    transformers_settings,
    vllm_settings,
)
from rgsd.judges import Judge, JudgeConfig, build_judge, try_out
from rgsd.progress import say
from rgsd.prompts.messages import PRIVILEGED_CONTEXTS, SHOWS_REFERENCE, PromptSettings, student_messages, training_rows
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG
from rgsd.redaction import without_credentials
from rgsd.rubrics import Example, fingerprint
from rgsd.runs import (
    ADAPTER,
    BASELINE,
    CANDIDATE,
    CONFIG,
    MODEL,
    RECORD,
    RESULTS,
    TRAINED,
    Run,
    conditioned_role,
    create_run,
    open_run,
)
from rgsd.settings import json_object, setting
from rgsd.workflows.train import DataConfig, load_split, results


@dataclass
class MeasureConfig:
    """What is measured, with what, and where the rows go."""

    output_dir: str = setting("", "Folder of the rows. Unset: runs/eval-NAME or runs/gap-NAME.")
    backend: str = setting(
        "transformers",
        "What generates: transformers, vllm (extra `vllm`), or server (any OpenAI-compatible one at api_base).",
        choices=["transformers", "vllm", "server"],
    )
    api_base: str | None = setting(None, "Address of the server that generates, e.g. http://localhost:8000/v1.")
    api_key_env: str | None = setting(None, "Environment variable that holds that server's key.")
    concurrency: int = setting(16, "Requests to that server in flight at once.")
    timeout: float = setting(600.0, "Seconds until a request to it is given up.")
    extra_body: dict[str, Any] | str | None = setting(
        None, "More fields of its requests, as JSON, e.g. '{\"frequency_penalty\": 0.0}' for `transformers serve`."
    )
    prompt_opens_thinking: bool = setting(
        False, "The server's chat template opens the reasoning, and the server does not split it off."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Passed to the chat template, as JSON, e.g. '{\"enable_thinking\": false}'."
    )
    max_new_tokens: int = setting(1024, "Longest response, in tokens.")
    batch_size: int = setting(16, "Prompts generated at once by transformers.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy, as in the paper.")
    top_p: float = setting(1.0, "Sampling takes the likeliest words of this total probability.")
    seed: int = setting(0, "Seed of sampling, of the bootstrap, and of the mismatched rubrics.")
    dtype: str = setting("auto", "Weights' type, as transformers names it.")
    model_revision: str = setting("main", "Revision of a hub model.")
    attn_implementation: str | None = setting(None, "Attention, as transformers names it.")
    trust_remote_code: bool = setting(False, "Run code that comes with a model. Only for sources that you trust.")
    template: str = setting("paper", "Template with which a rubric is shown: paper, cover, system, or a .jinja file.")
    show_weights: bool = setting(False, "Show each criterion's weight in it.")
    think_open_tag: str = setting(OPEN_TAG, "Opens the reasoning of a thinking model.")
    think_close_tag: str = setting(CLOSE_TAG, "Closes it. Reasoning is taken out before judging.")
    max_prompts: int | None = setting(None, "Measure on at most so many prompts, sampled by split_seed.")
    min_coverage: float = setting(0.95, "Fail when the judge scored less than this share of an arm's criteria.")
    overwrite: bool = setting(False, "Replace what the output_dir holds, rather than go on with it.")

    def __post_init__(self) -> None:
        for name in ("extra_body", "chat_template_kwargs"):
            setattr(self, name, json_object(name, getattr(self, name)))
        if not 0.0 <= self.min_coverage <= 1.0:
            raise ConfigError(f"min_coverage is {self.min_coverage}: a share from 0 to 1 is wanted")
        if self.backend == "server" and not self.api_base:
            raise ConfigError("backend is `server`, but api_base names none: give its address, e.g. --api_base URL/v1")
        if self.backend != "server" and self.api_base:
            raise ConfigError(f"api_base is set, but backend is {self.backend!r}: say --backend server")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}: 0 (greedy) or more is wanted")

    def sampling(self) -> SamplingConfig:
        """The sampling settings, for a generator."""
        template: Any = self.chat_template_kwargs or {}
        return SamplingConfig(
            self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            chat_template_kwargs=template,
            think_tags=(self.think_open_tag, self.think_close_tag),
        )


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure: `MODEL[:base][+ENRICHMENT]`.

    Args:
        source: a hub id, a folder, a .gguf file, a run's folder, or a server's model.
        is_base: of a run: the model that was trained from, rather than the trained one.
        privileged_context: what it is shown besides the prompt: none, rubric, mismatched, reference, both.
    """

    source: str
    is_base: bool = False
    privileged_context: str = "none"

    @property
    def is_run(self) -> bool:
        """Whether the source is a run's folder."""
        return (Path(self.source) / RECORD).is_file()

    @property
    def arm(self) -> str:
        """Its name in tables: trained, base or the model's own, and what it is shown."""
        name = ("base" if self.is_base else "trained") if self.is_run else Path(self.source).name
        return name if self.privileged_context == "none" else f"{name}+{self.privileged_context}"


def subject(text: str) -> Subject:
    """Read `MODEL[:base][+ENRICHMENT]`.

    Raises:
        ConfigError: for an empty model.
    """
    source, _, shown = text.rpartition("+")
    if not source or shown not in PRIVILEGED_CONTEXTS:
        source, shown = text, "none"
    is_base = source.endswith(":base")
    source = source.removesuffix(":base")
    if not source:
        raise ConfigError(
            f"{text!r} names no model: MODEL[:base][+rubric] is wanted, e.g. runs/demo or owner/name+rubric"
        )
    return Subject(source, is_base, shown)


def evaluate_models(
    names: Sequence[str],
    data: DataConfig,
    judge_config: JudgeConfig,
    settings: MeasureConfig,
    *,
    on_all: bool | None = None,
) -> Run:
    """Measure every model on the same prompts with the same judge; write the rows and the table.

    Args:
        names: as `subject` reads them; the first is what the others are compared with.
        data: the rubric data. Left at its default beside a run, the run's own data and held-out prompts are taken.
        judge_config: who judges.
        settings: the rest.
        on_all: measure on all prompts of the data, or on the held-out ones; None: on the held-out ones of a run or of
            data with `held_out_tags`, else on all.

    Raises:
        RGSDError: whatever keeps it from starting; `JudgeError` when the judge cannot go on or its coverage is too low.
            What was generated and judged is kept, and the same command goes on from there.
    """
    subjects = [subject(n) for n in names]
    arms = _arm_names(subjects)
    first_run = next((s.source for s in subjects if s.is_run), None)
    if first_run and data == DataConfig():
        data = _data_of(open_run(first_run))
        on_all = False if on_all is None else on_all
    examples = examples_for(data, settings, on_all)
    judge = build_judge(judge_config)
    _check_judge(examples, judge_config)
    run = opened(names, data, judge_config, settings)
    roles = _roles(subjects, arms)
    run.note(kind="eval", roles=roles, held_out_fingerprint=fingerprint(examples), judge=judge.name)
    measured: dict[str, list[dict[str, Any]]] = {}
    say(f"Measuring {', '.join(arms)} on {len(examples)} prompts, judge: {judge.name}")
    try:
        stored = [evaluate.stored_responses(run, arm) for arm in arms]
        try_out(judge, lazily=all(e.id in have for have in stored for e in examples))
        for source, members in _by_model(subjects, arms).items():
            generator = policy(source, settings)
            for one, arm in members:
                references = _references(one, examples, settings, run)
                prompts = prompts_for(one.privileged_context, examples, settings, references)
                measured[arm] = evaluate.measure(
                    run, arm, examples, prompts, generator, judge,
                    think_tags=(settings.think_open_tag, settings.think_close_tag),
                )  # fmt: skip
            del generator
    except (RGSDError, KeyboardInterrupt):
        if run.waiting is not None or run.replaced is not None:
            run.discard()
            raise
        run.note(status="stopped")
        say(f"What was generated and judged is in {run.folder}; the same command goes on from there.")
        raise
    ordered = {arm: measured[arm] for arm in arms}
    run.write(RESULTS, results(ordered, run, settings.seed, judge=judge.name, baseline=arms[0]))
    run.note(status="finished")
    for rows in ordered.values():
        evaluate.check_coverage(rows, settings.min_coverage)
    return run


def _arm_names(subjects: Sequence[Subject]) -> list[str]:
    """The subjects' names in tables, told apart by their folders where they are the same."""
    names = [s.arm for s in subjects]
    return [
        f"{Path(s.source).name}:{n}" if names.count(n) > 1 and s.is_run else s.source if names.count(n) > 1 else n
        for s, n in zip(subjects, names, strict=True)
    ]


def _roles(subjects: Sequence[Subject], arms: Sequence[str]) -> dict[str, str]:
    """What each arm is beside the others. The first of several is what the others are compared with."""
    roles = {}
    for one, arm in zip(subjects, arms, strict=True):
        if one.privileged_context != "none":
            roles[arm] = conditioned_role(one.privileged_context)
        elif one.is_run and not one.is_base:
            roles[arm] = TRAINED
        else:
            roles[arm] = BASELINE if len(arms) == 1 else CANDIDATE
    return roles | ({arms[0]: BASELINE} if len(arms) > 1 else {})


def _by_model(subjects: Sequence[Subject], arms: Sequence[str]) -> dict[Subject, list[tuple[Subject, str]]]:
    """Arms of the same weights together, so that these are loaded once."""
    groups: dict[Subject, list[tuple[Subject, str]]] = {}
    for one, arm in zip(subjects, arms, strict=True):
        groups.setdefault(dataclasses.replace(one, privileged_context="none"), []).append((one, arm))
    return groups


def prompts_for(
    privileged_context: str,
    examples: Sequence[Example],
    settings: MeasureConfig,
    references: Mapping[str, str] | None = None,
) -> list[list[dict[str, str]]]:
    """The conversations that a model shown this reads. `references` take the place of the examples' own."""
    if privileged_context == "none":
        return [student_messages(e) for e in examples]
    shown = PromptSettings(
        template=settings.template,
        show_weights=settings.show_weights,
        privileged_context=privileged_context,  # pyright: ignore[reportArgumentType]
        seed=settings.seed,
    )
    return [row["teacher_prompt"] for row in training_rows(examples, shown, references)]


def _references(one: Subject, examples: Sequence[Example], settings: MeasureConfig, run: Run) -> dict[str, str] | None:
    """Of a run that was trained with self-written references: those, and for other prompts new ones by its base. None
    where the examples' own are shown, or none."""
    if not one.is_run or one.privileged_context not in SHOWS_REFERENCE:
        return None
    of_run = open_run(one.source)
    recipe = of_run.settings
    if not recipe.get("self_written_references"):
        return None
    tags = (recipe.get("think_open_tag") or OPEN_TAG, recipe.get("think_close_tag") or CLOSE_TAG)
    as_trained = dataclasses.replace(
        settings,
        backend="transformers",
        api_base=None,
        max_new_tokens=recipe.get("max_completion_length") or 512,
        chat_template_kwargs=recipe.get("chat_template_kwargs"),
        temperature=0.0,
        think_open_tag=tags[0],
        think_close_tag=tags[1],
    )
    base = policy(Subject(one.source, is_base=True), as_trained)
    return evaluate.references(run, examples, base, think_tags=tags, also=of_run)


def _data_of(run: Run) -> DataConfig:
    fields = {f.name for f in dataclasses.fields(DataConfig)}
    return DataConfig(**{k: v for k, v in run.settings.items() if k in fields})


def examples_by_id(run: Run) -> dict[str, Example]:
    """All examples of the data that a run was trained or measured on."""
    data = _data_of(run)
    loaded = rubric_data.load(data.data, schema=data.schema, split=data.data_split, skip_bad_rows=data.skip_bad_rows)
    return {e.id: e for e in loaded.examples}


def examples_for(data: DataConfig, settings: MeasureConfig, on_all: bool | None) -> list[Example]:
    if on_all is None:
        on_all = not data.held_out_tags
    if on_all:
        loaded = rubric_data.load(
            data.data, schema=data.schema, split=data.data_split, skip_bad_rows=data.skip_bad_rows
        )
        for problem in loaded.problems:
            say(f"  skipped: {problem}")
        examples = list(rubric_data.deduplicate(loaded.examples).examples)
    else:
        examples = load_split(data).held_out
    if not examples:
        raise ConfigError(f"{data.data!r} gives no prompts to measure on")
    return rubric_data.subset(examples, settings.max_prompts, data.split_seed)


def _check_judge(examples: Sequence[Example], config: JudgeConfig) -> None:
    unchecked = sum(not e.rubric.is_checkable for e in examples)
    if config.needs_checks and unchecked:
        raise ConfigError(
            f"{unchecked} of {len(examples)} rubrics have criteria without a programmatic check: name an LLM judge, "
            "e.g. --judge openai/gpt-5.4, or --judge NAME --judge_api_base URL"
        )


_COSTS = frozenset(
    {f.name for f in dataclasses.fields(JudgeConfig)}
    - {"judge", "judge_kwargs", "judge_mode", "judge_strictness", "judge_temperature", "judge_max_tokens",
       "judge_reasoning_effort", "judge_structured", "judge_sample"}
)  # fmt: skip
"""Settings of the judge that change what it costs, not what it says."""
_FREE = _COSTS | {"output_dir", "overwrite", "min_coverage", "batch_size", "concurrency", "timeout", "api_key_env"}
"""Settings that may differ when an evaluation goes on."""


def opened(
    names: Sequence[str],
    data: DataConfig,
    judge: JudgeConfig,
    settings: MeasureConfig,
    more: Mapping[str, Any] | None = None,
) -> Run:
    """The run folder of an evaluation, new, or the one that the same settings began.

    Raises:
        RunError: when the folder holds an evaluation with settings under which other rows would have come.
    """
    flat: dict[str, Any] = {"models": list(names), **(more or {})}
    for part in (data, judge, settings):
        flat |= dataclasses.asdict(part)
    flat = without_credentials(flat)  # as it is stored, so that it can be compared with what was
    folder = settings.output_dir or f"runs/{'gap' if more else 'eval'}-{Path(subject(names[0]).source).name}"
    is_there = (Path(folder) / RECORD).is_file() and not settings.overwrite
    if is_there:
        before = open_run(folder).settings
        changed = sorted(
            k
            for k in flat.keys() | before.keys()
            if k not in _FREE and _comparable(before.get(k)) != _comparable(flat.get(k))
        )
        # More models on the same prompts are welcome; other answers under the same name are not.
        changed = [k for k in changed if not (k == "models" and set(before.get(k) or ()) <= set(names))]
        if changed:
            raise RunError(
                f"{folder} holds an evaluation with other settings ({', '.join(changed)}; see its {CONFIG}): choose "
                "another --output_dir, or say --overwrite true to replace it"
            )
    return create_run(folder, flat, overwrite=settings.overwrite, resume=is_there)


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


class _Deferred:
    """A model that is loaded when a response is missing, not before: what is stored may suffice."""

    def __init__(
        self,
        name: str,
        keys: Callable[[Sequence[Conversation]], list[ResponseKey]],
        build: Callable[[], Generator],
        built: Generator | None = None,
    ) -> None:
        self.name, self._keys, self._build, self._built = name, keys, build, built

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`."""
        return self._keys(prompts)

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`."""
        if self._built is None:
            self._built = self._build()
        return self._built.generate(prompts, done)


def policy(one: Subject, settings: MeasureConfig) -> Generator:
    """What answers for a subject, with keys that tell its weights from any others that its name may have stood for.

    The weights are read to the last byte for that, not loaded; of a server no more is known than its address.
    """
    if settings.backend == "server":
        return _generator(one, settings)
    weights, built = _identity(one, settings), None
    if weights is None:  # a hub model that is not on this machine yet: loading it brings it here
        built = _generator(one, settings)
        weights = _identity(one, settings) or f"hub:{one.source}@{settings.model_revision}"
    if not one.is_run and weights.startswith("hub:"):
        # What is loaded later must be what the keys say, whatever becomes of the branch meanwhile.
        settings = dataclasses.replace(settings, model_revision=weights.rpartition("@")[2])
    sampling = settings.sampling()
    if settings.backend == "vllm":
        of_settings = vllm_settings(sampling, dtype=settings.dtype)
    else:
        of_settings = transformers_settings(sampling, dtype=settings.dtype, attention=settings.attn_implementation)
    tokenizer: list[Any] = []

    def keys(prompts: Sequence[Conversation]) -> list[ResponseKey]:
        if not tokenizer:
            tokenizer.append(load_tokenizer(one, settings))
        sent = tokenize(tokenizer[0], prompts, sampling.chat_template_kwargs, one.source)
        return response_keys(weights, of_settings, sent, settings.temperature)

    return _Deferred(one.source, keys, lambda: _generator(one, settings), built)


def _identity(one: Subject, settings: MeasureConfig) -> str | None:
    """Which weights a subject has; None for a hub model that is not on this machine."""
    if not one.is_run:
        return models.identity(one.source, settings.model_revision)
    return models.base_identity(Path(one.source)) if one.is_base else models.trained_identity(Path(one.source))


def _generator(one: Subject, settings: MeasureConfig) -> Generator:
    sampling = settings.sampling()
    if settings.backend == "server":
        more: Any = settings.extra_body
        return ServerGenerator(
            one.source,
            sampling,
            api_base=str(settings.api_base),
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            extra_body=more,
            prompt_opens_thinking=settings.prompt_opens_thinking,
        )
    if settings.backend == "vllm":
        if one.is_run:
            raise ConfigError(
                f"vLLM loads model folders, and {one.source} is a run: "
                f"`rgsd export {one.source} --output_dir FOLDER` writes one"
            )
        return VllmGenerator(one.source, sampling, revision=settings.model_revision, dtype=settings.dtype)
    model, tokenizer = load(one, settings)
    return TransformersGenerator(model, tokenizer, sampling, batch_size=settings.batch_size)


def load_tokenizer(one: Subject, settings: MeasureConfig) -> Any:
    """The tokenizer of a subject."""
    name, revision = one.source, settings.model_revision
    if one.is_run:
        run = open_run(name)
        saved = next((run.folder / d for d in (ADAPTER, MODEL) if (run.folder / d).is_dir()), None)
        if saved is not None and not one.is_base:
            return models.load_tokenizer(str(saved), trust_remote_code=settings.trust_remote_code)
        name, revision = run.settings["model_name_or_path"], run.settings.get("model_revision") or "main"
    return models.load_tokenizer(name, revision, settings.trust_remote_code)


def load(one: Subject, settings: MeasureConfig) -> tuple[Any, Any]:
    """The model and tokenizer of a subject, on the device that is there."""
    import torch

    options: dict[str, Any] = {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
    }
    name = one.source
    if one.is_run and not one.is_base:
        dtype = None if settings.dtype == "auto" else settings.dtype
        model, tokenizer = models.load_trained(Path(name), dtype=dtype, trust_remote_code=settings.trust_remote_code)
    else:
        dtype = settings.dtype
        if one.is_run:
            of_run = open_run(name)
            models.ignored_trust(of_run, settings.trust_remote_code)
            record = of_run.settings
            name = record["model_name_or_path"]
            options["revision"] = record.get("model_revision") or "main"
            dtype = (record.get("dtype") or "float32") if dtype == "auto" else dtype
        tokenizer = models.load_tokenizer(name, **options)
        model = models.load_model(name, dtype=dtype, attn_implementation=settings.attn_implementation, **options)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device), tokenizer  # pyright: ignore[reportArgumentType]


__all__ = ["Judge", "MeasureConfig", "Subject", "evaluate_models", "load", "prompts_for", "subject"]
