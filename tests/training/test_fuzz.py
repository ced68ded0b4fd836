"""Any row becomes an example or a problem with a reason, never another exception; and odd inputs train."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.training import config, scripted

from rgsd.data import SCHEMAS, load
from rgsd.errors import ModelError, PromptTooLong, RGSDError
from rgsd.models import load_tokenizer
from rgsd.prompts.messages import PromptSettings, student_messages, teacher_messages, training_rows
from rgsd.rubrics import Criterion, Example, Rubric
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows.dry_run import stand_in_tokenizer

CHAT = [{"role": "user", "content": "Does a cough need a doctor?"}]
ROWS = {
    "rgsd": {
        "id": "a", "prompt": "Why?",
        "rubric": [{"criterion": "Says rest.", "weight": 5, "check": {"any": ["rest"]}}],
    },
    "rubrichub": {
        "prompt": CHAT, "data_source": "x", "ability": "y", "Rubrics": [{"criterion": "Says rest.", "points": 5}],
        "reward_model": {"style": "rubric", "ground_truth": "", "rubrics": [
            {"criterion": "Says rest.", "points": 5,
             "tags": {"verifier": "llm", "function": None, "parameters": None}}]},
        "extra_info": {},
    },
    "rubrichub_synthesis": {"question": "Why?", "id": "1", "rubrics": [{"criterion": "Says rest.", "points": 3}]},
    "rar": {
        "question": "Why?", "reference_answer": "Rest.", "question_source": "s", "rubric_list": [], "rubric_count": 1,
        "rubric": [{"description": "Essential Criteria: Says rest.", "title": "Rest", "weight": 5}],
    },
    "healthbench": {
        "prompt_id": "p", "prompt": CHAT,
        "rubrics": [{"criterion": "Says rest.", "points": -5, "tags": ["axis:accuracy"]}],
        "example_tags": [], "ideal_completions_data": None, "canary": "c",
    },
    "healthbench_professional": {
        "id": "1", "conversation": {"messages": CHAT}, "rubric_items": [{"criterion_text": "Says rest.", "points": 5}],
        "use_case": "u", "type": "t", "difficulty": "d", "specialty": "s", "physician_response": "Rest.",
    },
    "researchqa": {
        "id": "1", "general_domain": "g", "subdomain": "s", "field": "f", "query": "Why?", "date": "2025-01-01",
        "rubric": [{"rubric_item": "Says rest.", "type": "t"}],
    },
    "prbench": {
        "task": "t", "turns": 1, "field": "Law", "topic": "x", "expert": "e", "prompt_0": "Why?", "response_0": None,
        "rubric": [{"id": "1", "title": "Says rest.", "annotations": {
            "criteria_category": "c", "criteria_description": "Says rest.", "weight_class": "important",
            "important_weight": 5}}],
    },
    "researchrubrics": {
        "prompt": "Why?", "sample_id": "s", "domain": "d",
        "rubrics": [{"criterion": "Says rest.", "weight": -4, "axis": "a"}],
    },
    "verl": {
        "prompt": CHAT, "data_source": "x", "ability": "y", "extra_info": {},
        "reward_model": {"ground_truth": "", "style": "rubric", "rubrics": [{"criterion": "Says rest.", "points": 5}]},
    },
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["", "user", "\ud800", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def test_every_schema_is_fuzzed():
    assert {name.replace("-", "_") for name in SCHEMAS} == {name.replace("-", "_") for name in ROWS}


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def changed(row, path, value, delete):
    row = copy.deepcopy(row)
    if not path:
        return value
    holder = row
    for key in path[:-1]:
        holder = holder[key]
    if delete:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return row


@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_row_is_an_example_or_a_problem_with_a_reason(name, data, tmp_path):
    row = ROWS[name]
    for _ in range(data.draw(st.integers(0, 2))):
        if isinstance(row, dict):
            spots = list(places(row))
            row = changed(row, data.draw(st.sampled_from(spots)), data.draw(VALUES), data.draw(st.booleans()))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(ROWS[name]) + "\n")
    schema = next(s for s in SCHEMAS if s.replace("-", "_") == name.replace("-", "_"))
    try:
        loaded = load(file, schema=schema, skip_bad_rows=True)
    except RGSDError as error:
        loaded, reason = None, str(error)
    if loaded is None:
        assert len(reason) > 20
        return
    assert loaded.examples
    assert all(str(p) for p in loaded.problems)
    for example in loaded.examples:
        assert student_messages(example)
        assert teacher_messages(example, PromptSettings())
        assert all(math.isfinite(c.weight) for c in example.rubric.criteria)


@pytest.mark.parametrize("name", ROWS)
def test_the_row_that_is_changed_is_a_good_one(name, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[name]))
    assert len(load(tmp_path / "rows.jsonl").examples) == 1


# --- Odd inputs train -----------------------------------------------------------------------------------------------


def example(i, question="What helps with a cough?", criteria=2):
    rubric = Rubric(tuple(Criterion(f"Names remedy {k}.", 1 + k % 5) for k in range(criteria)))
    return Example(id=f"x{i}", messages=({"role": "user", "content": f"{question} {i}"},), rubric=rubric)


def with_room(model, positions):
    model.config.max_position_embeddings = positions
    return model


SCRIPTS = [
    "咳嗽怎么办",
    "ماذا يساعد على السعال؟",
    "क्या खांसी में मदद करता है?",
    "Что помогает от кашля?",
    "🤧❓",
    "a\u0000b\u200e\ufeff",
]


@pytest.mark.parametrize(
    "examples",
    [
        [example(i, criteria=1) for i in range(4)],
        [example(i, criteria=67) for i in range(4)],
        [example(i, s) for i, s in enumerate(SCRIPTS)],
    ],
    ids=["one criterion", "67 criteria", "scripts"],
)
def test_rubrics_and_scripts_of_any_kind(tmp_path, examples):
    made = stand_in_tokenizer(None)
    model = with_room(tiny_model(made), 8192)
    trainer = scripted(tmp_path, made, examples, model=model, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("response", [[], [7], [2]], ids=["empty", "one token", "end of sequence"])
def test_the_shortest_responses(tmp_path, tokenizer, examples, response):
    class Short(RGSDTrainer):
        def _decoded(self, student, prompt_ids):
            return [list(response) for _ in prompt_ids]

    trainer = Short(
        tiny_model(tokenizer), args=config(tmp_path, max_steps=1), train_dataset=examples, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.log_history[0]["response_length"] == 1  # an empty one is its end of sequence
    assert trainer.state.log_history[0]["loss"] > 0


LONG = [example(0, "now " * 7_600)]


def test_a_prompt_of_30_000_tokens_is_refused_where_it_does_not_fit(tmp_path, tokenizer):
    with pytest.raises(PromptTooLong, match=r"x0 \(\d\d,\d{3} tokens\)"):
        scripted(tmp_path, tokenizer, LONG, per_device_train_batch_size=1, gradient_accumulation_steps=1)


@pytest.mark.slow
def test_a_prompt_of_30_000_tokens_trains_where_it_fits(tmp_path, tokenizer):
    model = with_room(tiny_model(tokenizer), 65_536)
    trainer = scripted(
        tmp_path,
        tokenizer,
        LONG,
        model=model,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    assert len(trainer._tokenize_messages([trainer.train_dataset[0]["prompt"]])[0]) > 30_000
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


# --- Tokenizers and templates ---------------------------------------------------------------------------------------


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def retempled(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def test_a_template_without_a_system_role_takes_the_papers_prompt(tmp_path, tokenizer, examples):
    trainer = scripted(tmp_path, retempled(tokenizer, NO_SYSTEM), examples, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_template_that_begins_the_reasoning_masks_until_it_ends(tmp_path, tokenizer, examples):
    starts_in_thinking = retempled(tokenizer, tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n"))

    class Thinking(RGSDTrainer):
        def _decoded(self, student, prompt_ids):
            ids = tokenizer("secret</think>Rest.", add_special_tokens=False)["input_ids"]
            return [[*ids, tokenizer.eos_token_id] for _ in prompt_ids]

    trainer = Thinking(
        tiny_model(tokenizer), args=config(tmp_path), train_dataset=examples, processing_class=starts_in_thinking
    )
    (rollout,) = trainer._rollouts(list(trainer.train_dataset)[:1])
    kept = [t for t, keep in zip(rollout.response, rollout.in_loss, strict=True) if keep]
    assert tokenizer.decode(kept) == "Rest.<|im_end|>"


def test_a_tokenizer_without_a_template_is_refused_and_one_without_padding_is_not(tmp_path, tokenizer, examples):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="chat_template"):
        load_tokenizer(str(tmp_path / "bare"))
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    unpadded.save_pretrained(tmp_path / "unpadded")
    found = load_tokenizer(str(tmp_path / "unpadded"))
    assert found.pad_token == found.eos_token
    trainer = scripted(tmp_path / "run", found, examples, model=tiny_model(found), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


# --- What must stay shut --------------------------------------------------------------------------------------------


def test_no_pickle_is_loaded_and_no_key_is_kept(tmp_path, tokenizer, examples):
    trainer = scripted(
        tmp_path, tokenizer, examples, max_steps=1, save_strategy="steps", save_steps=1, hub_token="hf_secretsecret"
    )
    trainer.train()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hf_secretsecret" not in file.read_bytes(), file
    checkpoint = tmp_path / "checkpoint-1"
    assert not (checkpoint / "training_args.bin").exists()

    # A weights file that would run code is refused: torch.load takes tensors alone.
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save(Evil(), checkpoint / "optimizer.pt")
    (checkpoint / "manifest.json").unlink()
    again = scripted(tmp_path, tokenizer, examples, max_steps=2)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "pwned").exists()


def test_training_rows_of_any_rubric_are_made():
    assert len(training_rows([example(i, criteria=n) for i, n in enumerate((1, 67, 200))], PromptSettings())) == 3
