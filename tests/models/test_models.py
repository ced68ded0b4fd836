import pytest
import torch
from conftest import tiny_model

from rgsd.errors import ModelError
from rgsd.models import EMBEDDED, fingerprint, load_model, load_tokenizer, save_model


def test_the_fingerprint_tells_models_apart(tokenizer):
    assert fingerprint(tiny_model(tokenizer)) == fingerprint(tiny_model(tokenizer))
    assert fingerprint(tiny_model(tokenizer)) != fingerprint(tiny_model(tokenizer, seed=1))


@pytest.mark.integration
def test_the_embedded_model_loads_speaks_and_can_be_saved_again(tmp_path):
    tokenizer = load_tokenizer(EMBEDDED)
    model = load_model(EMBEDDED)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].size(1) :])
    save_model(model, tokenizer, tmp_path)
    again = load_model(str(tmp_path))
    assert not hasattr(again.config, "quantization_config")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such.gguf", "someone/not-cached-anywhere"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(ModelError, match=name):
        load_model(name)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, tokenizer, value):
    model = tiny_model(tokenizer, tied=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(str(tmp_path))
