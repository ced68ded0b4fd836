"""A run as the start of another: the same policy, its lineage, and what happens when a folder moves."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import stir_adapters, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rgsd import models
from rgsd.errors import ModelError, RunError
from rgsd.models.lineage import ancestors, lineage_from
from rgsd.models.loading import load_student
from rgsd.runs import open_run


def make_run(folder, base, tokenizer, *, peft=True, seed=1, lineage=(), dtype="float32"):
    """A finished run over the model `base`, with random values in place of training."""
    folder.mkdir(parents=True)
    model = models.load_model(str(base), dtype=dtype)
    torch.manual_seed(seed)
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        stir_adapters(model, 0.2)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    place = folder / ("adapter" if peft else "model")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(base), "dtype": dtype}))
    record = {"status": "finished", "id": f"id-{folder.name}", "kind": "rgsd", "lineage": list(lineage)}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def make_second(folder, first, tokenizer, **kwargs):
    line = lineage_from(str(first), models.identity(str(first)))
    return make_run(folder, first, tokenizer, seed=2, lineage=line, **kwargs)


@pytest.fixture
def base(tmp_path, tokenizer):
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits.float()


@pytest.mark.parametrize("peft", [True, False])
def test_a_run_as_a_model_is_its_trained_policy(base, tmp_path, tokenizer, peft):
    run = make_run(tmp_path / "first", base, tokenizer, peft=peft)
    model = models.load_model(str(run))
    assert torch.allclose(logits(model), logits(models.load_trained(run)[0]), atol=1e-5)
    assert not torch.allclose(logits(model), logits(models.load_model(str(base))), atol=1e-2)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert models.identity(str(run)) == models.trained_identity(run)
    assert models.load_tokenizer(str(run)).chat_template == tokenizer.chat_template


def test_the_adapter_is_merged_in_float32_over_the_base_as_trained_on(base, tmp_path, tokenizer, capsys):
    """A bfloat16 base is not replaced by the file's float32 weights, and merging does not round."""
    run = make_run(tmp_path / "first", base, tokenizer, dtype="bfloat16")
    merged = models.load_model(str(run), dtype="float32")
    unmerged, _ = load_student(run)
    for name, layer in models.adapters.layers(unmerged):
        plain = merged.get_submodule(name.removeprefix("base_model.model."))
        assert torch.equal(plain.weight, models.adapters.merged(layer)["weight"])
    assert "keeps" not in capsys.readouterr().out


def test_a_start_that_rounding_weakens_is_named(base, tmp_path, tokenizer, capsys):
    run = make_run(tmp_path / "first", base, tokenizer, dtype="bfloat16")
    adapter = run / "adapter" / "adapter_model.safetensors"
    save_file({k: v * (1e-3 if "lora_B" in k else 1) for k, v in load_file(adapter).items()}, adapter)
    models.load_model(str(run), dtype="bfloat16")
    assert "--dtype float32" in capsys.readouterr().out


def test_a_third_run_stands_on_both_before_it(base, tmp_path, tokenizer):
    first = make_run(tmp_path / "first", base, tokenizer)
    second = make_second(tmp_path / "second", first, tokenizer)
    third = make_second(tmp_path / "third", second, tokenizer, peft=False)
    assert [a.id for a in ancestors(open_run(third))] == ["id-second", "id-first"]
    assert models.base_identity(second) == models.trained_identity(first)
    assert torch.allclose(logits(models.load_model(str(second))), logits(models.load_trained(second)[0]), atol=1e-5)
    # A whole model needs none of the runs before it.
    before = logits(models.load_model(str(third)))
    shutil.rmtree(first)
    shutil.rmtree(second)
    assert torch.equal(logits(models.load_model(str(third))), before)


def test_both_runs_can_move_together_and_neither_alone(base, tmp_path, tokenizer):
    first = make_run(tmp_path / "a" / "first", base, tokenizer)
    second = make_second(tmp_path / "a" / "second", first, tokenizer)
    wanted = logits(models.load_trained(second)[0])
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.equal(logits(models.load_trained(tmp_path / "b" / "second")[0]), wanted)
    (tmp_path / "b" / "first").rename(tmp_path / "elsewhere")
    for action in (models.load_trained, models.trained_identity):
        with pytest.raises(ModelError, match=r"first \(id id-first\)"):
            action(tmp_path / "b" / "second")


def test_a_parent_that_was_trained_again_is_not_the_parent(base, tmp_path, tokenizer):
    first = make_run(tmp_path / "first", base, tokenizer)
    second = make_second(tmp_path / "second", first, tokenizer)
    shutil.rmtree(first)
    make_run(tmp_path / "first", base, tokenizer, seed=9)
    with pytest.raises(ModelError, match=r"weights|fingerprint"):
        models.load_trained(second)


def test_an_export_of_a_second_run_is_a_model_of_its_own(base, tmp_path, tokenizer):
    first = make_run(tmp_path / "first", base, tokenizer)
    second = make_second(tmp_path / "second", first, tokenizer)
    wanted = logits(models.load_trained(second)[0])
    models.export(second, tmp_path / "out")
    for folder in (base, first, second):
        shutil.rmtree(folder)
    assert torch.allclose(logits(models.load_model(str(tmp_path / "out"))), wanted, atol=1e-5)


def test_an_unfinished_run_is_no_start(base, tmp_path, tokenizer):
    run = make_run(tmp_path / "first", base, tokenizer)
    (run / "run.json").write_text('{"status": "running"}')
    with pytest.raises(RunError, match="finished"):
        models.load_model(str(run))


def test_runs_that_name_each_other_are_refused_and_not_followed(base, tmp_path, tokenizer):
    """A stranger's run folder must not send the loader round in circles."""
    one, two = make_run(tmp_path / "one", base, tokenizer), make_run(tmp_path / "two", base, tokenizer)
    for run, other in ((one, two), (two, one)):
        (run / "config.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match="lineage"):
        models.load_model(str(one))
    for run, other in ((one, two), (two, one)):
        entry = {"run": str(other), "id": f"id-{other.name}", "kind": "rgsd", "weights": "w"}
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"lineage": [entry]}))
    with pytest.raises(ModelError, match="id-"):
        models.load_model(str(one))


@pytest.mark.parametrize("lineage", ["x", [1], [{"run": "a"}], [{"run": 1, "id": "", "kind": "", "weights": ""}]])
def test_a_lineage_that_cannot_be_read_is_refused(base, tmp_path, tokenizer, lineage):
    run = make_run(tmp_path / "first", base, tokenizer)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"lineage": lineage}))
    with pytest.raises(RunError, match="lineage"):
        open_run(run)
