"""The learning regression test: fixed, seeded runs of the real trainer on the nano model must learn, and only what is
taught. A trainer that shuffles rubrics, trains its teacher, takes the loss over the wrong tokens or forgets the
think-mask fails here."""

import pytest
import torch

from rgsd import models, pipeline
from rgsd.evaluate import judge_responses
from rgsd.generation import generate
from rgsd.judges import ChecksJudge
from rgsd.lab.grid import load_arms
from rgsd.lab.running import Job, recipe_of
from rgsd.lab.world import World, write_jsonl
from rgsd.prompts import PromptSettings, mentions_rubric, training_rows

STEPS = 30
N_PROMPTS = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learn(folder, arm, **settings):
    """Mean satisfaction, tokens and share that names the rubric, on held-out prompts, alone and shown the rubric."""
    chosen = load_arms()[arm]
    job = Job(folder, 0, chosen.task, chosen)
    job.home.parent.mkdir()
    world = World()
    write_jsonl(world.examples(think=chosen.task.think), job.data)
    run = pipeline.train(recipe_of(chosen.command, {**job.settings(), "max_steps": STEPS, **settings}))
    model, tokenizer = models.load_trained(run.folder)
    return run, {shown: reached(model, tokenizer, world, chosen.task.think, shown) for shown in ("none", "rubric")}


def reached(model, tokenizer, world, think, shown):
    examples = world.examples("held-out", think=think)[:N_PROMPTS]
    rows = training_rows(examples, PromptSettings("cover", enrichment=shown))
    prompts = [row["teacher_prompt"] for row in rows]
    responses = generate(model, tokenizer, prompts, max_new_tokens=96, batch_size=N_PROMPTS)
    judged = judge_responses(examples, responses, ChecksJudge(), arm=shown)
    return {
        "satisfaction": sum(row["score"] for row in judged) / len(judged),
        "tokens": sum(r.n_tokens for r in responses) / len(responses),
        "names_rubric": sum(mentions_rubric(r.text) for r in responses) / len(responses),
    }


def test_the_right_rubric_is_learnt(tmp_path):
    run, found = learn(tmp_path, "rgsd")
    assert found["none"]["satisfaction"] >= 0.55
    # The policy still follows a rubric that it is shown: nothing was taught to the teacher's side.
    assert found["rubric"]["satisfaction"] >= 0.9
    losses = [row["loss"] for row in run.read_lines("metrics.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_a_mismatched_rubric_is_not(tmp_path):
    _, found = learn(tmp_path, "mismatched")
    assert found["none"]["satisfaction"] <= 0.45


def test_reasoning_does_not_learn_to_name_the_rubric(tmp_path):
    _, found = learn(tmp_path, "think")
    assert found["none"]["satisfaction"] >= 0.4
    assert found["none"]["names_rubric"] <= 0.1
