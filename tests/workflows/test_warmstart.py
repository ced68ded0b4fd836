import json

import torch
from conftest import tiny_model
from safetensors.torch import load_file
from trl import ModelConfig, SFTConfig

from rgsd.data import bundled
from rgsd.data.config import DataConfig
from rgsd.prompts.messages import PromptSettings
from rgsd.rubrics import Criterion
from rgsd.rubrics.checks import holds
from rgsd.workflows.warmstart import WarmStartConfig, pairs, warm_start, without

EXAMPLE = Criterion("Gives an example.", 1, check={"any": ["for example"]})
BULLETS = Criterion("Uses bullets.", 1, check={"count": {"of": "bullets", "min": 2}})
REST = Criterion("Advises rest.", 1, check={"any": ["rest"]})
TEXT = "In short, wait.\n- Rest well.\n- Drink. For example, tea.\nSee."


def test_sentences_of_a_criterion_are_left_out():
    assert without(TEXT, [EXAMPLE]) == "In short, wait.\n- Rest well.\n- Drink. See."
    assert without(TEXT, [BULLETS]) == "In short, wait.\nRest well.\nDrink. For example, tea.\nSee."
    assert without("Rest. For example, rest on a sofa.", [EXAMPLE], kept=[REST]) == "Rest. For example, rest on a sofa."


def test_an_opening_is_cut_off_a_sentence_that_meets_a_kept_criterion():
    opening = Criterion("Opens with In short.", 1, check={"starts": {"regex": "^\\W*in short\\b"}})
    assert without("In short, rest. See.", [opening], kept=[REST]) == "Rest. See."
    assert without("In short, no: rest. See.", [opening], kept=[REST]) == "No: rest. See."
    assert without("In short, wait. Rest.", [opening], kept=[REST]) == "Rest."
    assert without("Rest. In short, wait.", [opening], kept=[REST]) == "Rest. In short, wait."


def test_pairs_of_the_bundled_data_show_what_the_target_meets():
    examples = [e for e in bundled().examples if "split:train" in e.tags]
    rows = pairs(examples, PromptSettings(template="cover"), per_example=3, seed=0)
    assert rows == pairs(examples, PromptSettings(template="cover"), per_example=3, seed=0)
    assert len(rows) > 3 * len(examples)
    forms = {c.text: c for e in examples for c in e.rubric if c.tags[0] in ("form", "safety") and "own" not in c.tags}
    hidden: dict[str, list[bool]] = {}
    for row in rows:
        prompt, target = row["prompt"][-1]["content"], row["completion"][0]["content"]
        for text, criterion in forms.items():
            if text in prompt:
                assert holds(criterion.check, target), (text, target)
            else:
                hidden.setdefault(criterion.tags[1], []).append(holds(criterion.check, target))
    share = {form: sum(met) / len(met) for form, met in hidden.items()}
    assert share.pop("number") < 0.15  # a figure is often the fact itself
    assert max(share.values()) < 0.1, share
    assert share["opening"] < 0.02


def test_a_half_precision_model_is_trained_whole_in_float32(tmp_path, tokenizer, monkeypatch):
    tiny_model(tokenizer).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {
        "id": "r",
        "prompt": "What helps with a cough?",
        "reference": "Rest. For example, rest on a sofa.",
        "rubric": [
            {"criterion": "Advises rest.", "weight": 1, "check": {"any": ["rest"]}},
            {"criterion": "Gives an example.", "weight": 1, "check": {"any": ["for example"]}},
        ],
    }
    rows = [row | {"id": f"r{i}", "prompt": f"What helps with a cough number {i}?"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = SFTConfig(str(tmp_path / "run"), max_steps=2, learning_rate=1e-6, use_cpu=True, bf16=False,
                         report_to="none", save_strategy="no", per_device_train_batch_size=1,
                         gradient_checkpointing=False)  # fmt: skip
    model = ModelConfig(str(tmp_path / "model"), dtype="bfloat16", use_peft=False)
    run = warm_start(training, model, DataConfig(data=str(tmp_path / "data.jsonl"), held_out=1), WarmStartConfig())
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run.folder / "model"))
    assert {t.dtype for t in after.values()} == {torch.float32}
    changed = sum(int((after[n] != before[n].float()).sum()) for n in after)
    assert changed > 0.9 * sum(t.numel() for t in after.values())
