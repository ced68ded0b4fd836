"""Stored responses and verdicts count only for the weights, settings, prompt, judge and text that made them."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import stir_adapters, tiny_model, write_recipes
from peft import LoraConfig, get_peft_model

from rgsd import models
from rgsd.cli import main
from rgsd.errors import RGSDError
from rgsd.evaluation.arms import evaluate_arm
from rgsd.evaluation.config import MeasureConfig
from rgsd.evaluation.policies import policy_generator
from rgsd.evaluation.run_ref import RunRef
from rgsd.evaluation.samples import read_samples
from rgsd.inference import Response, SamplingConfig, TransformersGenerator, response_keys
from rgsd.judges import ChecksJudge
from rgsd.prompts.messages import student_messages
from rgsd.report.facts import read
from rgsd.rubrics import Rubric
from rgsd.runs import RESPONSES, SAMPLES, SET_ASIDE, create_run, open_run


class Scripted:
    """A generator that counts its prompts."""

    name = "scripted"

    def __init__(self, weights="w", text="Rest.", **settings):
        self.weights, self.text, self.settings, self.asked = weights, text, settings, 0

    def keys(self, prompts):
        return response_keys(self.weights, self.settings, prompts)

    def generate(self, prompts, done=None):
        found = [Response(self.text, 3, False) for _ in prompts]
        self.asked += len(prompts)
        for i, response in enumerate(found):
            done(i, response)
        return found


class Counting(ChecksJudge):
    """The programmatic judge with settings, counting its calls."""

    def __init__(self, name="checks", identity="a"):
        self.name, self.identity, self.judged = name, identity, 0

    def judge(self, example, response):
        self.judged += 1
        return super().judge(example, response)


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", {})


def measured(run, examples, generator, judge=None, arm="trained"):
    prompts = [student_messages(e) for e in examples]
    return evaluate_arm(run, arm, examples, prompts, generator, judge or Counting())


def test_the_same_again_is_neither_generated_nor_judged(run, examples, capsys):
    generator, judge = Scripted(), Counting()
    first = measured(run, examples, generator, judge)
    assert measured(run, examples, generator, judge) == first
    assert (generator.asked, judge.judged) == (8, 8)
    assert "set aside" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"weights": "v"}, "8 of other weights"),
        ({"max_new_tokens": 9}, "8 with other generation settings"),
    ],
)
def test_another_policys_rows_are_never_used_and_their_number_is_said(run, examples, capsys, other, why):
    measured(run, examples, Scripted())
    kept = measured(run, examples, Scripted(), arm="base")
    rows = measured(run, examples, Scripted(text="Tea.", **other))
    assert {s.response for s in rows} == {"Tea."}
    said = capsys.readouterr().out
    assert f"trained: set aside 8 stored responses and 8 samples (in {SET_ASIDE}): {why}" in said
    # No reader of the run meets them any more, and they are not lost.
    assert {r["text"] for r in run.read_lines(RESPONSES) if r["arm"] == "trained"} == {"Tea."}
    assert {r["response"] for r in run.read_lines(SAMPLES) if r["arm"] == "trained"} == {"Tea."}
    assert [s for s in read_samples(run) if s.arm == "base"] == kept
    assert len(run.read_lines(SET_ASIDE)) == 16


def test_a_changed_prompt_sets_its_own_row_aside_alone(run, examples, capsys):
    generator = Scripted()
    measured(run, examples, generator)
    changed = [replace(examples[0], messages=({"role": "user", "content": "Else?"},)), *examples[1:]]
    measured(run, changed, generator)
    assert generator.asked == 9
    assert "set aside 1 stored responses and 1 samples" in capsys.readouterr().out
    measured(run, changed[1:], generator)
    assert "to prompts that are not evaluated" in capsys.readouterr().out
    assert len(run.read_lines(SAMPLES)) == 7


def test_rows_of_unknown_origin_are_not_used(run, examples, capsys):
    """Rows in the format before keys."""
    measured(run, examples, Scripted())
    for name in (RESPONSES, SAMPLES):
        rows = [{k: v for k, v in r.items() if not k.endswith("key")} for r in run.read_lines(name)]
        (run.folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    generator = Scripted()
    measured(run, examples, generator)
    assert generator.asked == 8
    assert "of unknown origin" in capsys.readouterr().out


def test_verdicts_are_of_one_judge_with_its_settings_on_one_text_and_rubric(run, examples, capsys):
    generator = Scripted()
    measured(run, examples, generator, Counting("llm", "strict"))
    other = Counting("llm", "lenient")
    measured(run, examples, generator, other)
    assert (generator.asked, other.judged) == (8, 8)
    assert "set aside 8 samples" in capsys.readouterr().out
    second = Counting("checks")
    measured(run, examples, generator, second)
    assert len(run.read_lines(SAMPLES)) == 16  # two judges, side by side
    # A criterion that changed: verdicts of all judges on it are stale, of the others none.
    first, second_one = examples[0].rubric
    criteria = (replace(first, text="Advises much rest."), second_one)
    changed = [replace(examples[0], rubric=Rubric(criteria)), *examples[1:]]
    measured(run, changed, generator, second)
    assert (generator.asked, second.judged) == (8, 9)
    texts = {r["judge"]: r["verdicts"][0]["criterion"] for r in run.read_lines(SAMPLES) if r["example_id"] == "e0"}
    assert texts == {"checks": "Advises much rest."}


# What tells weights apart.


def test_the_key_holds_every_value_of_an_adapter_and_the_prompt_as_sent(tokenizer, examples):
    model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules="all-linear"))
    stir_adapters(model, 0.1)
    prompts = [student_messages(e) for e in examples[:2]]

    def keys(batch_size=8, **settings):
        sampling = SamplingConfig(**{"max_new_tokens": 4, **settings})
        return TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size).keys(prompts)

    first = keys()
    assert first == keys() == keys(seed=1, batch_size=3)  # greedy: neither has a part in it
    assert first[0].prompt != first[1].prompt
    assert {k.settings for k in first} != {k.settings for k in keys(max_new_tokens=5)}
    assert keys(temperature=1.0)[0].settings != keys(temperature=1.0, seed=1)[0].settings
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
    for position in (0, parameter.numel() // 2, parameter.numel() - 1):
        with torch.no_grad():
            parameter.view(-1)[position] += 1e-6
        changed = keys()
        assert changed[0].weights != first[0].weights
        assert (changed[0].settings, changed[0].prompt) == (first[0].settings, first[0].prompt)
        first = changed


def test_a_folders_identity_is_of_all_its_bytes(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    first = models.identity(str(tmp_path / "m"))
    (tmp_path / "m" / "README.md").write_text("no part of it")
    assert models.identity(str(tmp_path / "m")) == first
    path = tmp_path / "m" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    assert models.identity(str(tmp_path / "m")) != first
    assert models.identity("owner/never-on-this-machine") is None


# The commands.


@pytest.fixture
def world(tmp_path, tokenizer):
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"What helps with a cough number {i}?",
            "rubric": [{"criterion": "Has an early letter.", "weight": 5, "check": {"regex": "[a-h]"}}],
        }
        for i in range(10)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    write_recipes(tmp_path, tokenizer)
    return tmp_path


def responses(run, arm):
    return [r["response"] for r in sorted(open_run(run).read_lines(SAMPLES), key=lambda r: r["example_id"])
            if r["arm"] == arm]  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("peft", ["true", "false"])
def test_training_gone_on_with_reports_the_policy_that_it_ended_with(world, capsys, peft):
    recipe = ["train", "--config", str(world / "recipe.yaml"), "--save_strategy", "steps", "--save_steps", "2"]
    recipe += ["--use_peft", peft]
    assert main(recipe) == 0
    assert main([*recipe, "--max_steps", "6", "--resume_from_checkpoint", "true"]) == 0
    said = capsys.readouterr().out
    assert "trained: set aside 4 stored responses and 4 samples" in said
    assert "base: set aside" not in said  # the base has not changed: neither generated nor judged again
    assert said.count("base: responses: 4/4") == 1
    evaluated = world / "eval"
    assert main(["eval", str(world / "run"), "--output_dir", str(evaluated), "--max_new_tokens", "8"]) == 0
    assert responses(world / "run", "trained") == responses(evaluated, "trained")


@pytest.mark.integration
def test_a_run_trained_again_in_another_precision_has_another_base(world):
    assert main(["train", "--config", str(world / "recipe.yaml"), "--evaluate", "false"]) == 0
    prompts = [[{"role": "user", "content": "What helps with a cough?"}]]

    def key(policy):
        return policy_generator(RunRef(str(world / "run"), policy), MeasureConfig(backend="transformers")).keys(prompts)

    before = key("base"), key("trained")
    config = world / "run" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"dtype": "bfloat16"}))
    assert [k.weights for k in key("base")] == [k.weights for k in before[0]]
    assert key("base") != before[0]
    assert key("trained") != before[1]


@pytest.mark.integration
def test_a_resumed_run_that_stops_again_reports_no_policy_that_is_gone(world, monkeypatch, capsys):
    recipe = ["train", "--config", str(world / "recipe.yaml"), "--save_strategy", "steps", "--save_steps", "2"]
    assert main(recipe) == 0
    # Resumed with nothing left to do, it keeps what it has.
    assert main([*recipe, "--resume_from_checkpoint", "true"]) == 0
    assert "set aside" not in capsys.readouterr().out
    assert read([str(world / "run")]).runs[0].role("trained") is not None

    def stop(*args):
        raise RGSDError("stopped")

    explained = ["explain", str(world / "run"), "--keep", "true", "--output", str(world / "map.html")]
    assert main(explained) == 0
    assert len(read([str(world / "run")]).runs[0].maps) == 1
    capsys.readouterr()
    monkeypatch.setattr("rgsd.workflows.train.save_policy", stop)
    assert main([*recipe, "--max_steps", "6", "--resume_from_checkpoint", "true"]) == 1
    said = capsys.readouterr().out
    assert "trained: set aside 4 stored responses and 4 samples" in said
    assert "of an earlier step" in said
    (facts,) = read([str(world / "run")]).runs
    assert facts.role("trained") is None
    assert facts.maps == []
    assert facts.role("base") or [a.name for a in facts.arms if a.name == "base"]


@pytest.mark.integration
def test_an_evaluation_after_retraining_is_of_the_new_policy(world, capsys):
    recipe = ["train", "--config", str(world / "recipe.yaml"), "--evaluate", "false", "--overwrite", "true"]
    evaluation = ["eval", str(world / "run"), "--output_dir", str(world / "eval"), "--max_new_tokens", "8"]
    assert main(recipe) == 0
    assert main(evaluation) == 0
    capsys.readouterr()
    assert main(evaluation) == 0
    assert "responses:" not in capsys.readouterr().out  # nothing is generated for the same policy
    first = responses(world / "eval", "trained")
    assert main([*recipe, "--max_steps", "8", "--seed", "7"]) == 0
    assert main(evaluation) == 0
    assert "4 of other weights" in capsys.readouterr().out
    second = responses(world / "eval", "trained")
    assert main([*evaluation[:3], str(world / "fresh"), *evaluation[4:]]) == 0
    assert second == responses(world / "fresh", "trained")
    assert second != first
