"""A damaged checkpoint, even of unchanged size, is skipped with a notice, and the previous complete one is used."""

import json
import shutil

import pytest
from support.killing import assert_same, make_world, outcome, run

from rgsd.errors import RunError
from rgsd.training.checkpoints import MANIFEST, PROGRESS, find_checkpoint, last_complete, problem_of, write_manifest

FILES = {
    "model.safetensors": b"weights" * 2000,
    "optimizer.pt": b"optimizer" * 2000,
    "scheduler.pt": b"scheduler" * 20,
    "rng_state.pth": b"random" * 100,
    "teacher.safetensors": b"teacher" * 2000,
    "trainer_state.json": b'{"global_step": 4}',
    PROGRESS: b'{"tokens": 1}',
}


def save(folder, step, run="own"):
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name, content in FILES.items():
        (made / name).write_bytes(content)
    write_manifest(made, step=step, processes=1, run=run)
    return made


@pytest.fixture
def two(tmp_path):
    """A run with checkpoints 2 and 4."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "own"}))
    return save(tmp_path / "run", 2), save(tmp_path / "run", 4)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def zero_4k(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(min(4096, size)))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, zero, zero_4k, halve, lambda p: p.unlink()])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(two, name, harm):
    good, damaged = two
    harm(damaged / name)
    told = []
    assert last_complete(good.parent, told.append) == good
    assert len(told) == 1
    assert name in told[0]
    with pytest.raises(RunError, match=name):
        find_checkpoint(good.parent, str(damaged))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "0",
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"a": "b"}}',
        '{"fi',
        "[" * 100_000,
        "\0",
    ],
)
def test_a_damaged_manifest(two, text):
    good, damaged = two
    (damaged / MANIFEST).write_text(text)
    told = []
    assert last_complete(good.parent, told.append) == good
    assert MANIFEST in told[0]


def test_a_manifest_of_another_step_or_run_or_without_a_digest(two):
    good, damaged = two
    whole = json.loads((damaged / MANIFEST).read_text())
    for changed in (
        whole | {"step": 2},
        whole | {"run": "another"},
        whole | {"run": None},
        whole | {"sha256": {}},
        {k: v for k, v in whole.items() if k != "sha256"},
        whole | {"sha256": whole["sha256"] | {"optimizer.pt": "0" * 64}},
    ):
        (damaged / MANIFEST).write_text(json.dumps(changed))
        assert last_complete(good.parent, lambda text: None) == good
    (damaged / MANIFEST).write_text(json.dumps(whole))
    assert last_complete(good.parent) == damaged


def test_links_copies_and_additions(two, tmp_path):
    good, last = two
    stranger = save(tmp_path / "other", 6, run="another")
    told = []
    (good.parent / "checkpoint-6").symlink_to(stranger)
    shutil.copytree(stranger, good.parent / "checkpoint-8")
    manifest = json.loads((good.parent / "checkpoint-8" / MANIFEST).read_text())
    (good.parent / "checkpoint-8" / MANIFEST).write_text(json.dumps(manifest | {"step": 8}))
    assert last_complete(good.parent, told.append) == last
    assert "belongs to run another" in told[0]
    assert "checkpoint-6" in told[1]
    with pytest.raises(RunError, match="checkpoint-6"):
        find_checkpoint(good.parent, str(good.parent / "checkpoint-6"))
    (last / "pytorch_model_fsdp.bin").write_bytes(b"other weights")
    assert "pytorch_model_fsdp.bin" in str(problem_of(last))
    (last / "pytorch_model_fsdp.bin").unlink()
    (last / "optimizer.pt").unlink()
    (last / "optimizer.pt").symlink_to(good / "optimizer.pt")
    assert "optimizer.pt" in str(problem_of(last))


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("harm", [flip, zero], ids=["flip", "zero"])
@pytest.mark.parametrize("kind", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", MANIFEST])
def test_a_damaged_run_goes_on_from_the_checkpoint_before_and_ends_the_same(tmp_path, tokenizer, kind, harm):
    recipe = make_world(tmp_path, tokenizer, use_peft=False, evaluate=False, save_steps=2)
    argv = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert run(argv, tmp_path)[0] == 0
    want = outcome(tmp_path / "run", 5)
    harm(tmp_path / "run" / "checkpoint-5" / kind)
    code, text = run([*argv, "--resume_from_checkpoint", "true"], tmp_path)
    assert code == 0, text
    assert "Skipping checkpoint-5" in text
    assert_same(outcome(tmp_path / "run", 5), want)
