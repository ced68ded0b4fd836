"""Learning regression tests: seeded runs of the real trainer on the nano model must learn what is taught, and nothing
else. A trainer that shuffles rubrics, trains its teacher, takes the loss over the wrong tokens or forgets the think
mask fails here."""

import pytest
import torch

from rgsd import models
from rgsd.lab import nano_scores
from rgsd.lab.grid import load_arms
from rgsd.lab.running import LabJob, recipe_of
from rgsd.lab.world import World, write_jsonl
from rgsd.workflows.train import train

pytestmark = pytest.mark.integration

STEPS = 30
N_PROMPTS = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learn(folder, arm, **settings):
    """The run, and its policy's scores on held-out prompts, alone and with the rubric."""
    chosen = load_arms()[arm]
    job = LabJob(folder, 0, chosen.task, chosen)
    job.home.parent.mkdir()
    world = World()
    write_jsonl(world.examples(think=chosen.task.think), job.data)
    run = train(recipe_of(chosen.command, {**job.settings(), "max_steps": STEPS, **settings}))
    model, tokenizer = models.load_trained(run.folder)
    names = [f"{name}, thinking" if chosen.task.think else name for name in ("base", "base+rubric")]
    return run, *nano_scores.measure(model, tokenizer, world, names=names, n_prompts=N_PROMPTS).values()


def test_the_right_rubric_is_learnt(tmp_path):
    run, alone, shown = learn(tmp_path, "rgsd")
    assert alone.satisfaction >= 0.62
    # The policy still follows a rubric that it is shown: nothing was taught to the teacher's side.
    assert shown.satisfaction >= 0.9
    losses = [row["loss"] for row in run.read_lines("metrics.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_a_mismatched_rubric_is_not(tmp_path):
    _, alone, _ = learn(tmp_path, "mismatched")
    assert alone.satisfaction <= 0.47


def test_reasoning_does_not_learn_to_name_the_rubric(tmp_path):
    _, alone, _ = learn(tmp_path, "think")
    assert alone.satisfaction >= 0.4
    assert alone.names_rubric <= 0.1
