"""SIGTERM, non-finite losses, full disks and read-only folders: a clear end, nothing lost."""

import json
import resource
import signal

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from support.killing import CONTEXT, assert_same, make_world, outcome, run
from support.training import Scripted, config

from rgsd.cli import main
from rgsd.errors import TrainingDiverged
from rgsd.training.checkpoints import SAVING, last_complete, list_checkpoints

pytestmark = pytest.mark.integration

FULL = {"use_peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.3}


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_step_saves_it_and_the_run_goes_on(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **FULL, save_steps=100, logging_steps=2)
    argv = ["train", "--config", str(recipe)]
    code, text = run([*argv, "--output_dir", str(tmp_path / "whole")], tmp_path)
    assert code == 0, text
    stopped = [*argv, "--output_dir", str(tmp_path / "stopped")]
    code, text = run(stopped, tmp_path, "rollout", 3, signal.SIGTERM)
    assert code == 143, text
    assert "stopped by SIGTERM after step 3 of 5; checkpoint-3 is saved" in text
    assert [c.name for c in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]
    code, text = run([*stopped, "--resume_from_checkpoint", "true"], tmp_path)
    assert code == 0, text
    assert_same(outcome(tmp_path / "stopped", 5), outcome(tmp_path / "whole", 5))


def test_sigterm_in_the_last_step_ends_the_run_as_it_would_have(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **FULL, max_steps=2)
    code, text = run(
        ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")],
        tmp_path,
        "rollout",
        2,
        signal.SIGTERM,
    )
    assert code == 0, text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


# --- Losses and weights that are no numbers ---------------------------------------------------------------------------


class Poisoned(Scripted):
    """A NaN loss in the third step for rows with a poisoned example, or an infinite gradient."""

    poison, ids = "loss", ("e5",)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step == 2 and set(self.ids) & set(inputs["example_ids"]):
            loss = loss * float("nan") if self.poison == "loss" else loss + _InfiniteGradient.apply(loss)
        return loss


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_or_gradient_that_is_no_number_stops_before_the_weights_are_touched(
    tmp_path, tokenizer, examples, poison, max_grad_norm
):
    trainer = Poisoned(
        tiny_model(tokenizer),
        args=config(
            tmp_path,
            max_steps=4,
            shuffle_dataset=False,
            save_strategy="steps",
            save_steps=1,
            max_grad_norm=max_grad_norm,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        ),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    trainer.poison = poison
    with pytest.raises(TrainingDiverged) as raised:
        trainer.train()
    message = str(raised.value)
    assert message.startswith(f"step 3: {'the loss is nan' if poison == 'loss' else 'the gradient norm is'}")
    assert "e5" in message
    assert ("e0" in message) == (poison == "gradient")  # for a loss, the message names only its micro-batch
    assert "checkpoint-2" in message
    assert [c.name for c in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name


def test_non_finite_weights_are_never_saved(tmp_path, tokenizer, examples):
    class Overflowing(Scripted):
        def _end_of_step(self):
            super()._end_of_step()
            if self.state.global_step == 2:
                with torch.no_grad():
                    self.model.model.norm.weight[3] = float("nan")

    trainer = Overflowing(
        tiny_model(tokenizer),
        args=config(tmp_path, max_steps=3, save_strategy="steps", save_steps=1),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    with pytest.raises(TrainingDiverged, match=r"step 2: model\.norm\.weight"):
        trainer.train()
    assert [c.name for c in list_checkpoints(tmp_path)] == ["checkpoint-1"]


# --- The disk ---------------------------------------------------------------------------------------------------------


def _run_with_a_small_disk(argv, output, largest):
    """Limit files to `largest` bytes, which looks like a full disk to the writer."""
    from support.killing import _run

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    _run(argv, None, 1, 0, output)


@pytest.mark.parametrize("largest", [60_000, 110_000], ids=["weights", "optimizer"])
def test_a_full_disk_ends_with_a_reason_and_leaves_no_half_checkpoint(tmp_path, tokenizer, largest):
    recipe = make_world(tmp_path, tokenizer, use_peft=False, evaluate=False, max_steps=2, save_steps=1)
    argv = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    process = CONTEXT.Process(target=_run_with_a_small_disk, args=(argv, str(tmp_path / "out.txt"), largest))
    process.start()
    process.join(60)
    text = (tmp_path / "out.txt").read_text()
    assert process.exitcode == 1, text
    assert "checkpoint-1" in text
    assert "Traceback" not in text
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / SAVING).exists()
    # With room, the same command goes on.
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert last_complete(tmp_path / "run").name == "checkpoint-2"


def test_a_folder_that_cannot_be_written_is_said(tmp_path, tokenizer, capsys):
    recipe = make_world(tmp_path, tokenizer, use_peft=False, evaluate=False, max_steps=1)
    assert main(["train", "--config", str(recipe), "--output_dir", "/proc/rgsd-run"]) == 1
    assert "/proc/rgsd-run" in capsys.readouterr().err


def test_a_disk_that_fills_while_rows_are_written_is_said(tmp_path, tokenizer, capsys, monkeypatch):
    from rgsd.runs import Run

    def full(self, name, rows):
        raise OSError(28, "No space left on device", str(self.folder / name))

    recipe = make_world(tmp_path, tokenizer, use_peft=False, evaluate=False, max_steps=1)
    monkeypatch.setattr(Run, "append", full)
    assert main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "metrics.jsonl: No space left on device" in error
    assert "the same command resumes" in error
