import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from rgsd.errors import ConfigError, ModelError
from rgsd.training.teacher import Teacher

IDS = torch.arange(12)[None] + 5


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def shift(model, by=0.1):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by


def lora(model, **kwargs):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **kwargs))


@pytest.mark.parametrize("wrap", [lambda m: m, lora])
def test_the_base_teacher_is_the_policy_before_training(tokenizer, wrap):
    model = wrap(tiny_model(tokenizer)).eval()
    before = logits(model)
    teacher = Teacher(model, "base")
    shift(model)
    trained = logits(model)
    assert not torch.equal(trained, before)
    with teacher.active():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)  # bit for bit


def test_fresh_lora_needs_no_copy_and_a_trained_adapter_does(tokenizer):
    assert Teacher(lora(tiny_model(tokenizer)))._copy == {}
    model = lora(tiny_model(tokenizer)).eval()
    shift(model, 0.05)  # an adapter that was trained before: the base policy includes it
    before = logits(model)
    teacher = Teacher(model, "base")
    shift(model)
    with teacher.active():
        assert torch.equal(logits(model), before)


def test_ema_moves_at_its_rate_and_survives_a_checkpoint(tokenizer):
    model = tiny_model(tokenizer)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    teacher = Teacher(model, "ema", teacher_update_rate=0.25)
    shift(model, 1.0)
    teacher.update()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, start[name] + 0.25)
    other = Teacher(tiny_model(tokenizer), "ema", teacher_update_rate=0.25)
    other.load_state_dict(teacher.state_dict())
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in teacher.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(tokenizer):
    teacher = Teacher(tiny_model(tokenizer), "ema")
    with pytest.raises(ModelError, match="teacher_model_kind"):
        teacher.load_state_dict({"x": torch.zeros(1)})


def test_live_is_the_student_in_eval_mode_without_a_graph(tokenizer):
    model = tiny_model(tokenizer).train()
    with Teacher(model, "live").active():
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training


def test_the_teachers_head_is_found_when_it_was_trained(tokenizer):
    model = tiny_model(tokenizer, tied=False)
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    teacher = Teacher(model, "base")
    shift(model)
    assert torch.equal(teacher.value_of(head), before)
    assert teacher.value_of(None) is None


def test_settings_are_checked(tokenizer):
    with pytest.raises(ConfigError, match="teacher_model_kind"):
        Teacher(tiny_model(tokenizer), "frozen")
    with pytest.raises(ConfigError, match="teacher_update_rate"):
        Teacher(tiny_model(tokenizer), "ema", teacher_update_rate=0.0)
    with pytest.raises(ConfigError, match="float32"):
        Teacher(tiny_model(tokenizer).bfloat16(), "ema")


def lora_products(model):
    """B A of each adapted layer, times its scale."""
    return {
        name: module.get_delta_weight("default").detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }


def test_ema_of_lora_is_the_product_of_the_averages(tokenizer):
    """By design, as the help of `teacher_update_rate` says: the average of the products would take a full matrix
    a layer."""
    model = lora(tiny_model(tokenizer))
    teacher = Teacher(model, "ema", teacher_update_rate=0.5)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    shift(model, 1.0)
    student = lora_products(model)
    teacher.update()
    layer = next(n for n in student if n.endswith("q_proj"))
    a, b = (first[f"{layer}.lora_{x}.default.weight"] for x in "AB")
    scale = model.get_submodule(layer).scaling["default"]
    with teacher.active():
        of_teacher = lora_products(model)[layer]
    torch.testing.assert_close(of_teacher, scale * (b + 0.5) @ (a + 0.5))
    average_of_products = 0.5 * student[layer]  # the first product is zero
    assert (of_teacher - average_of_products).abs().max() > 0.1  # a step this long tells them apart


def test_at_training_rates_it_is_near_the_average_of_the_products(tokenizer):
    model = lora(tiny_model(tokenizer))
    teacher = Teacher(model, "ema", teacher_update_rate=0.05)
    exact = {n: torch.zeros_like(d) for n, d in lora_products(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(60):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update()
        for name, delta in lora_products(model).items():
            exact[name].lerp_(delta, 0.05)
    student = lora_products(model)
    with teacher.active():
        factors = lora_products(model)
    between = max(float((factors[n] - d).norm() / d.norm()) for n, d in exact.items())
    behind = min(float((student[n] - d).norm() / d.norm()) for n, d in exact.items())
    assert between < 0.02
    assert behind > 10 * between  # the lag of the average far exceeds the neglected difference
