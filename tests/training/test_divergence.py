"""The divergence against the paper's formulas, and the chunked path against the plain one: values and gradients."""

import math

import pytest
import torch

from rgsd.errors import ConfigError
from rgsd.training.loss import DivergenceSpec, Head, _most_likely, _zero_above, chunked_divergence, divergence

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
CLIPS = [("none", 0.05), ("entry", 0.05), ("entry", 0.002), ("token", 0.1)]
N, V, H = 11, 37, 8


def by_hand(student, teacher, beta, clip, tau, temperature):
    """One token and one vocabulary entry at a time, in Python floats."""

    def softmax(row):
        top = max(row)
        exps = [math.exp((z - top) / temperature) for z in row]
        return [e / sum(exps) for e in exps]

    total = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        entries = []
        for p, q in zip(softmax(t_row), softmax(s_row), strict=True):
            if beta == 0:
                entries.append(p * (math.log(p) - math.log(q)))
            elif beta == 1:
                entries.append(q * (math.log(q) - math.log(p)))
            else:
                m = beta * p + (1 - beta) * q
                entries.append(beta * p * math.log(p / m) + (1 - beta) * q * math.log(q / m))
        if clip == "entry":
            entries = [min(e, tau) for e in entries]
        token = sum(entries)
        total += min(token, tau) if clip == "token" else token
    return total


def problem(dtype=torch.float64, *, spread=2.0, trained_head=True, bias=True, scale=1.0, softcap=None, n=N, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, grad=False):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * spread).to(dtype).requires_grad_(grad)

    hidden = rand(n, H, grad=True)
    weight = rand(V, H, grad=trained_head)
    bias_v = rand(V, grad=trained_head) if bias else None
    teacher = Head(rand(V, H), rand(V) if bias else None, scale, softcap)
    return hidden, Head(weight, bias_v, scale, softcap), rand(n, H), teacher


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("clip", "tau"), CLIPS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_is_the_formula(beta, clip, tau, temperature):
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 13, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    out = divergence(student, teacher, DivergenceSpec(beta, clip, tau, temperature))
    assert out.total.item() == pytest.approx(by_hand(student, teacher, beta, clip, tau, temperature), rel=1e-10)
    assert out.count == 5


def gradients(out, *tensors):
    return torch.autograd.grad(out.total, [t for t in tensors if t is not None and t.requires_grad])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("clip", "tau"), CLIPS)
@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("variant", [{}, {"trained_head": False}, {"bias": False, "softcap": 3.0, "scale": 0.5}])
def test_chunked_equals_plain(beta, clip, tau, top_k, variant, monkeypatch):
    monkeypatch.setattr("rgsd.training.loss.BLOCK_ELEMENTS", 3 * V)  # 4 = 3 + 1
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        hidden, head, teacher_hidden, teacher_head = problem(dtype, spread=0.7, **variant)
        spec = DivergenceSpec(beta, clip, tau, temperature=1.3, top_k=top_k, chunk_tokens=4)  # 11 = 4 + 4 + 3
        plain = divergence(head.logits(hidden), teacher_head.logits(teacher_hidden), spec)
        chunked = chunked_divergence(hidden, head, teacher_hidden, teacher_head, spec)
        for name in ("total", "clipped_N", "unclipped_N", "student_entropy_N", "teacher_entropy_N"):
            torch.testing.assert_close(getattr(chunked, name), getattr(plain, name), atol=tolerance, rtol=tolerance)
        assert torch.equal(chunked.is_clipped_N, plain.is_clipped_N)
        assert torch.equal(chunked.teacher_top_N, plain.teacher_top_N)
        inputs = (hidden, head.weight_VH, head.bias_V)
        for got, want in zip(gradients(chunked, *inputs), gradients(plain, *inputs), strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_contrastive_teacher_is_the_formula(gamma, temperature):
    """log p* = log p(right) + gamma (log p(right) - log p(contrast)), normalised, one probability at a time."""
    g = torch.Generator().manual_seed(4)
    student, right, contrast = (torch.randn(5, 13, generator=g, dtype=torch.float64) * 2 for _ in range(3))
    rows = []
    for r, c in zip(right.tolist(), contrast.tolist(), strict=True):
        p, q = (
            [math.exp(z / temperature) / sum(math.exp(x / temperature) for x in row) for z in row] for row in (r, c)
        )
        weights = [a * (a / b) ** gamma for a, b in zip(p, q, strict=True)]
        # As logits at the loss temperature, for `by_hand`.
        rows.append([temperature * math.log(w / sum(weights)) for w in weights])
    spec = DivergenceSpec(0.5, "none", temperature=temperature, contrast=gamma)
    out = divergence(student, right, spec, contrast)
    teacher = torch.tensor(rows, dtype=torch.float64)
    assert out.total.item() == pytest.approx(by_hand(student, teacher, 0.5, "none", 1.0, temperature), rel=1e-9)
    assert torch.equal(out.teacher_top_N, teacher.argmax(-1))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("clip", "tau"), CLIPS)
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("variant", [{}, {"trained_head": False}, {"bias": False, "softcap": 3.0, "scale": 0.5}])
def test_chunked_equals_plain_under_a_contrast(beta, clip, tau, top_k, variant, monkeypatch):
    monkeypatch.setattr("rgsd.training.loss.BLOCK_ELEMENTS", 3 * V)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-5)):
        hidden, head, right, teacher_head = problem(dtype, spread=0.7, **variant)
        contrast = problem(dtype, spread=0.7, seed=5, **variant)[2]
        spec = DivergenceSpec(beta, clip, tau, temperature=1.3, top_k=top_k, chunk_tokens=4, contrast=1.5)
        logits = [teacher_head.logits(h) for h in (right, contrast)]
        plain = divergence(head.logits(hidden), logits[0], spec, logits[1])
        chunked = chunked_divergence(hidden, head, right, teacher_head, spec, contrast_hidden_NH=contrast)
        for name in ("total", "clipped_N", "unclipped_N", "student_entropy_N", "teacher_entropy_N"):
            torch.testing.assert_close(getattr(chunked, name), getattr(plain, name), atol=tolerance, rtol=tolerance)
        assert torch.equal(chunked.teacher_top_N, plain.teacher_top_N)
        inputs = (hidden, head.weight_VH, head.bias_V)
        for got, want in zip(gradients(chunked, *inputs), gradients(plain, *inputs), strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_a_contrast_with_itself_changes_nothing():
    hidden, head, right, teacher_head = problem()
    plain = chunked_divergence(hidden, head, right, teacher_head, DivergenceSpec())
    spec = DivergenceSpec(contrast=2.0)
    same = chunked_divergence(hidden, head, right, teacher_head, spec, contrast_hidden_NH=right.clone())
    torch.testing.assert_close(same.clipped_N, plain.clipped_N)
    torch.testing.assert_close(gradients(same, hidden), gradients(plain, hidden))


@pytest.mark.parametrize("beta", BETAS)
def test_a_contrast_of_logits_of_ten_thousand_stays_finite(beta):
    hidden, head, right, teacher_head = problem(torch.float32, spread=60.0)
    contrast = problem(torch.float32, spread=60.0, seed=5)[2]
    spec = DivergenceSpec(beta, chunk_tokens=4, contrast=2.0)
    out = chunked_divergence(hidden, head, right, teacher_head, spec, contrast_hidden_NH=contrast)
    assert out.total.isfinite()
    assert all(g.isfinite().all() for g in gradients(out, hidden, head.weight_VH, head.bias_V))


def test_a_contrast_and_its_states_come_together():
    hidden, head, right, teacher_head = problem()
    with pytest.raises(ConfigError, match="contrast"):
        chunked_divergence(hidden, head, right, teacher_head, DivergenceSpec(contrast=1.0))
    with pytest.raises(ConfigError, match="contrast"):
        chunked_divergence(hidden, head, right, teacher_head, DivergenceSpec(), contrast_hidden_NH=right)
    spec = DivergenceSpec(contrast=1.0)
    with pytest.raises(ConfigError, match="contrast"):
        chunked_divergence(hidden, head, right, teacher_head, spec, contrast_hidden_NH=right[:-1])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(beta, top_k, softcap):
    hidden, head, teacher_hidden, teacher_head = problem(spread=0.5, softcap=softcap, scale=1.5, n=5)
    spec = DivergenceSpec(beta, "entry", 0.03, top_k=top_k, chunk_tokens=2)

    def total(h, w, b):
        return chunked_divergence(h, Head(w, b, 1.5, softcap), teacher_hidden, teacher_head, spec).total

    assert torch.autograd.gradcheck(total, (hidden, head.weight_VH, head.bias_V))


@pytest.mark.parametrize("chunk", [1, 3, N, 100, None])
def test_the_chunk_size_changes_nothing(chunk):
    inputs = problem()
    want = chunked_divergence(*inputs, DivergenceSpec(chunk_tokens=5))
    got = chunked_divergence(*inputs, DivergenceSpec(chunk_tokens=chunk))
    torch.testing.assert_close(got.total, want.total)
    torch.testing.assert_close(gradients(got, inputs[0]), gradients(want, inputs[0]))


@pytest.mark.parametrize("vocabulary", [37, 64, 640])
def test_the_most_likely_token_is_argmaxs(vocabulary):
    g = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 20, (50, vocabulary), generator=g).float()  # many ties: the first wins
    assert torch.equal(_most_likely(logits), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_entries_above_the_threshold_lose_their_gradient(dtype):
    cap = torch.tensor(0.05, dtype=dtype)
    entries = torch.stack([cap, torch.nextafter(cap, cap + 1), cap - 1, cap + 1, torch.nextafter(cap, cap - 1)])
    assert _zero_above(0.05, entries, torch.ones(5, dtype=dtype)).tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("beta", BETAS)
def test_logits_of_ten_thousand_stay_finite(beta):
    hidden, head, teacher_hidden, teacher_head = problem(torch.float32, spread=60.0)
    assert head.logits(hidden).abs().max() > 1e4
    out = chunked_divergence(hidden, head, teacher_hidden, teacher_head, DivergenceSpec(beta, chunk_tokens=4))
    plain = divergence(head.logits(hidden), teacher_head.logits(teacher_hidden), DivergenceSpec(beta))
    torch.testing.assert_close(out.total, plain.total, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients(out, hidden, head.weight_VH, head.bias_V))


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_is_near_fp32(beta):
    low = problem(torch.bfloat16, spread=0.5)
    high = tuple(
        x.detach().float().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor)
        else Head(x.weight_VH.detach().float(), x.bias_V.detach().float())
        for x in low
    )
    spec = DivergenceSpec(beta, chunk_tokens=4)
    got, want = chunked_divergence(*low, spec), chunked_divergence(*high, spec)
    torch.testing.assert_close(got.total.float(), want.total, rtol=0.02, atol=0.02)
    (grad_low,), (grad_high,) = gradients(got, low[0]), gradients(want, high[0])
    assert grad_low.dtype == torch.bfloat16
    torch.testing.assert_close(grad_low.float(), grad_high, rtol=0.1, atol=0.02)


def test_no_token_gives_a_zero_that_keeps_the_graph():
    hidden, head, teacher_hidden, teacher_head = problem(n=0)
    out = chunked_divergence(hidden, head, teacher_hidden, teacher_head, DivergenceSpec())
    (out.total / 1).backward()
    assert out.count == 0
    assert out.total.item() == 0
    assert hidden.grad is not None
    assert head.weight_VH.grad is not None
    assert torch.count_nonzero(head.weight_VH.grad) == 0


def test_equal_models_give_zero_and_no_gradient():
    hidden, head, *_ = problem(trained_head=False)
    for beta in BETAS:
        out = chunked_divergence(hidden, head, hidden.detach(), head, DivergenceSpec(beta, "none"))
        assert out.total.item() == pytest.approx(0, abs=1e-12)
        assert gradients(out, hidden)[0].abs().max() < 1e-12


def test_the_bounds_of_the_method():
    """At beta = 0.5 an entry is at most ln(2)/2 and a token at most ln 2; entries are not negative."""
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[0, 0] = teacher[0, 1] = 1e4
    out = divergence(student, teacher, DivergenceSpec(0.5, "none"))
    assert out.total.item() == pytest.approx(math.log(2), rel=1e-6)
    capped = divergence(student, teacher, DivergenceSpec(0.5, "entry", math.log(2) / 2 + 1e-6))
    assert not capped.is_clipped_N.any()


def test_the_readings_of_the_clip_differ_where_the_teacher_disagrees_most():
    """A token clip removes the gradient of a token above the threshold; an entry clip leaves its other entries'."""
    hidden, head, teacher_hidden, teacher_head = problem(spread=1.5, trained_head=False)
    by_token = chunked_divergence(hidden, head, teacher_hidden, teacher_head, DivergenceSpec(0.5, "token", 0.05))
    by_entry = chunked_divergence(hidden, head, teacher_hidden, teacher_head, DivergenceSpec(0.5, "entry", 0.05))
    over = by_token.is_clipped_N
    assert over.any()
    assert gradients(by_token, hidden)[0][over].abs().max() == 0
    assert (gradients(by_entry, hidden)[0][over].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_never_more_than_a_chunk_of_logits(gamma):
    """Neither forward nor backward creates a tensor of vocabulary width with more rows than a chunk."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    hidden, head, teacher_hidden, teacher_head = problem(n=64, trained_head=False, bias=False)
    contrast = teacher_hidden.flip(0) if gamma else None
    with Spy():
        spec = DivergenceSpec(chunk_tokens=4, contrast=gamma)
        chunked_divergence(
            hidden, head, teacher_hidden, teacher_head, spec, contrast_hidden_NH=contrast
        ).total.backward()
    assert max(seen) <= max(4 * V, 64 * H, V * H)


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"beta": 1.5}, "beta"),
        ({"clip": "both"}, "clip"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"chunk_tokens": -1}, "chunk_tokens"),
        ({"contrast": -0.5}, "teacher_contrast"),
        ({"contrast": math.inf}, "teacher_contrast"),
        ({"contrast": math.nan}, "teacher_contrast"),
    ],
)
def test_settings_out_of_range_are_refused(kwargs, field):
    with pytest.raises(ConfigError, match=field):
        DivergenceSpec(**kwargs)


def test_mismatched_inputs_are_refused():
    hidden, head, teacher_hidden, teacher_head = problem()
    with pytest.raises(ConfigError, match="11 student and 10 teacher"):
        chunked_divergence(hidden, head, teacher_hidden[:-1], teacher_head, DivergenceSpec())
    with pytest.raises(ConfigError, match="vocabulary"):
        chunked_divergence(hidden, head, teacher_hidden, Head(teacher_head.weight_VH[:-1]), DivergenceSpec())
