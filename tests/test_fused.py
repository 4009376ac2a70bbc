"""The fused loss is the loss of lessons 2 and 3 without the logits: the same value and gradients in
float64 for every mask, weight, temperature and alpha, and at most a tenth of the memory."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import train_distill_reason
import train_distillation
import train_pretrain
from distill import fused_loss, use_fused
from distill.fused import CHUNK, CHUNK_LOGITS, MOST_BYTES, chunk_size
from methods import cached_teacher
from model.device import give_back_memory, peak_memory_mb, reset_peak_memory

B, S, V, D, E = 3, 7, 50, 12, 20


def tensors(seed=0, dtype=torch.float64, shape=(B, S), V=V):
    """The student's hidden states (B, S, D) and head (V, D), the teacher's, and labels (B, S)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    hidden, head = normal(*shape, D).requires_grad_(), normal(V, D).requires_grad_()
    labels = torch.randint(V, shape, generator=generator)
    labels[0, :3] = -100
    return hidden, head, (normal(*shape, E), normal(V, E)), labels


def logits_of(hidden, head):
    return hidden @ head.T


def by_chunks(
    hidden, head, teacher, labels, temperature=1.0, alpha=1.0, weights=None, chunk=None,
    compiled=False,
):  # fmt: skip
    """Lesson 2 or, where there are weights, lesson 3."""
    chosen = {"chunk": chunk, "compiled": compiled}
    rest, valid = ((hidden, head), teacher, labels), labels != -100
    if weights is None:
        lesson = train_distillation.compute_loss
        return fused_loss(lesson, *rest, temperature, alpha, weight=valid, **chosen)
    lesson, weights = train_distill_reason.compute_loss, torch.where(valid, weights, 0.0)
    return fused_loss(lesson, *rest, weights, temperature, alpha, weight=weights, **chosen)


def plain_loss(hidden, head, teacher, labels, temperature=1.0, alpha=0.5, weights=None):
    """Lesson 2 or, where there are weights, lesson 3."""
    logits = logits_of(hidden, head), logits_of(*teacher) if teacher else None
    if weights is None:
        return train_distillation.compute_loss(*logits, labels, temperature, alpha)[0]
    flat = (None if x is None else x.flatten(0, 1) for x in logits)
    weights = torch.where(labels == -100, 0.0, weights).flatten()
    return train_distill_reason.compute_loss(
        *flat, labels.flatten(), weights, temperature, alpha
    )[0]  # fmt: skip


WEIGHTS = {
    "none": None,
    "some": torch.rand(B, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "one row": (torch.arange(B)[:, None].expand(B, S) == 1).double(),
    "less than 1": torch.full((B, S), 0.01, dtype=torch.float64),
    "all 0": torch.zeros(B, S, dtype=torch.float64),
}


def assert_same(first, second, inputs, tolerance=1e-9):
    """Equal values, and equal gradients of 3 * value (a factor that backward must not lose)."""
    torch.testing.assert_close(first, second, atol=tolerance, rtol=0)
    grads = [torch.autograd.grad(3 * value, inputs, retain_graph=True) for value in (first, second)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [4, None])
def test_value_and_gradients_are_the_plain_loss(weights, temperature, alpha, chunk):
    hidden, head, teacher, labels = tensors()
    rest = (labels, temperature, alpha, WEIGHTS[weights])
    plain = plain_loss(hidden, head, teacher, *rest)
    fused, parts = by_chunks(hidden, head, teacher, *rest, chunk)
    assert_same(plain, fused, (hidden, head))
    assert not any(part.requires_grad for part in parts.values())  # they are for the log


def test_without_a_teacher_it_is_lesson_1():
    hidden, head, _, labels = tensors()
    plain, _ = train_pretrain.compute_loss(logits_of(hidden, head), labels)
    assert_same(plain, by_chunks(hidden, head, None, labels, chunk=4)[0], (hidden, head))
    library = F.cross_entropy(logits_of(hidden, head).flatten(0, 1), labels.flatten())
    assert_same(library, by_chunks(hidden, head, None, labels)[0], (hidden, head))


@pytest.mark.parametrize("labels", [None, -100], ids=["some labels", "no label"])
def test_tokens_may_stand_in_one_row(labels):
    """Lesson 3 gives (N, D): only what has a label; N may be 0."""
    hidden, head, teacher, all_labels = tensors()
    chosen = all_labels != -100 if labels is None else torch.zeros(B, S, dtype=torch.bool)
    rows = by_chunks(
        hidden[chosen], head, (teacher[0][chosen], teacher[1]), all_labels[chosen], 2.0, 0.3
    )[0]
    all_labels[~chosen] = -100
    whole = by_chunks(hidden, head, teacher, all_labels, 2.0, 0.3)[0]
    assert_same(rows, whole, (hidden, head))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_stands_at_ignored_tokens_does_not_matter(bad, weighted):
    hidden, head, teacher, labels = tensors()
    weights = torch.ones(B, S) if weighted else None
    if weighted:
        weights[2, 3:] = 0
    else:
        labels[2, 3:] = -100
    expected, _ = by_chunks(hidden, head, teacher, labels, 1.0, 0.5, weights)
    spoilt, spoilt_teacher = hidden.detach().clone(), teacher[0].clone()
    spoilt[2, 3:], spoilt_teacher[2, 3:] = bad, bad
    spoilt.requires_grad_()
    fused, _ = by_chunks(spoilt, head, (spoilt_teacher, teacher[1]), labels, 1.0, 0.5, weights)
    assert torch.equal(fused, expected)
    fused.backward()
    assert spoilt.grad.isfinite().all() and head.grad.isfinite().all()
    assert (spoilt.grad[2, 3:] == 0).all()


@pytest.mark.parametrize("chunk", [4, 8, None])
def test_any_loss_that_is_a_mean_over_tokens(chunk):
    """Of a tensor with more dimensions, as a teacher's cache has them, a chunk's rows are taken."""
    hidden, head, teacher, labels = tensors()
    log_probs, ids = logits_of(*teacher).log_softmax(-1).topk(5)  # (B, S, 5)
    rest = (1 - log_probs.exp().sum(-1)).log()  # (B, S)

    def lesson(logits, labels, method, ids, log_probs, rest):
        kept = (ids, log_probs, rest)
        return cached_teacher.compute_loss(logits, labels, method, kept, 2.0, 0.5)

    others = (labels, "tail", ids, log_probs, rest)
    plain, parts = lesson(logits_of(hidden, head), *others)
    fused, found = fused_loss(lesson, (hidden, head), *others, weight=labels != -100, chunk=chunk)
    assert_same(plain, fused, (hidden, head))
    for name, value in parts.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-9)


def test_the_teacher_gets_no_gradient():
    hidden, head, teacher, labels = tensors()
    teacher = tuple(tensor.requires_grad_() for tensor in teacher)
    by_chunks(hidden, head, teacher, labels, 1.0, 0.5)[0].backward()
    assert teacher[0].grad is None and teacher[1].grad is None


def test_frozen_head_and_frozen_body():
    """LoRA freezes heads, probes freeze bodies: the other gradient is the same without it."""
    hidden, head, teacher, labels = tensors()
    rest = (teacher, labels, 1.0, 0.5)
    both = torch.autograd.grad(by_chunks(hidden, head, *rest)[0], (hidden, head))
    alone = by_chunks(hidden, head.detach(), *rest)[0]
    assert torch.equal(torch.autograd.grad(alone, hidden)[0], both[0])
    alone = by_chunks(hidden.detach(), head, *rest)[0]
    assert torch.equal(torch.autograd.grad(alone, head)[0], both[1])
    with torch.no_grad():
        value = by_chunks(hidden, head, *rest)[0]
    assert torch.equal(value, alone) and not value.requires_grad


def test_tied_head():
    """The head's gradient adds to what the same weight gets as an embedding."""
    _, head, teacher, labels = tensors()
    ids = labels.clamp(min=0)
    fused = by_chunks(head[ids], head, teacher, labels, 1.0, 0.5)[0]
    assert_same(plain_loss(head[ids], head, teacher, labels), fused, (head,))


def test_bfloat16_autocast_sums_in_float32():
    """Products in bfloat16, as of the plain loss under autocast; sums and loss in float32."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32, shape=(2, 100))
    rest = (teacher, labels, 1.0, 0.5)
    exact = plain_loss(hidden, head, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, parts = by_chunks(hidden, head, *rest, chunk=16)
        logits = F.linear(hidden, head), F.linear(*teacher)
        plain, _ = train_distillation.compute_loss(*logits, labels, 1.0, 0.5)
    assert fused.dtype == parts["ce"].dtype == parts["kl"].dtype == torch.float32
    assert fused.item() == pytest.approx(plain.item(), rel=1e-3)
    whole = by_chunks(hidden, head, *rest, chunk=16)[0]
    assert fused.item() != whole.item() == pytest.approx(exact.item(), rel=1e-5)
    errors = []
    for loss in (plain, fused):
        grads = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
        wanted = torch.autograd.grad(exact, (hidden, head), retain_graph=True)
        errors.append(
            [float((g - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)]
        )
        assert all(grad.dtype == torch.float32 for grad in grads)
    assert errors[1][0] < 1.2 * errors[0][0] < 0.05
    assert errors[1][1] < 1.2 * errors[0][1] < 0.05  # 13 chunks summed: no worse than one product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_sum_in_float32(dtype):
    """Hidden states and heads that are stored in 16 bits: loss in float32, gradients in 16 bits."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32, shape=(2, 20))
    low, low_head = (x.detach().to(dtype).requires_grad_() for x in (hidden, head))
    low_teacher = tuple(x.to(dtype) for x in teacher)
    loss, _ = by_chunks(low, low_head, low_teacher, labels, 1.0, 0.5, chunk=8)
    assert loss.dtype == torch.float32
    exact = plain_loss(hidden, head, teacher, labels)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    grads = torch.autograd.grad(loss, (low, low_head))
    for grad, wanted in zip(grads, torch.autograd.grad(exact, (hidden, head)), strict=True):
        assert grad.dtype == dtype
        assert (grad.float() - wanted).norm() < 0.05 * wanted.norm()


# Compiled.


def test_compiled_whole():
    hidden, head, teacher, labels = tensors(dtype=torch.float32)

    def loss(hidden, head):
        return by_chunks(2 * hidden, head, teacher, labels, 2.0, 0.5, chunk=8)[0]

    compiled = torch.compile(loss, backend="aot_eager")
    assert_same(loss(hidden, head), compiled(hidden, head), (hidden, head), 1e-5)


HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "cl")))


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
@pytest.mark.parametrize("temperature, alpha", [(2.0, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_compiled_chunks(temperature, alpha):
    """The last chunk is shorter than the others."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32)
    rest = (teacher if alpha < 1 else None, labels, temperature, alpha, None, 5)
    plain, compiled = (by_chunks(hidden, head, *rest, flag)[0] for flag in (False, True))
    assert_same(plain, compiled, (hidden, head), 1e-5)


# Memory.


@pytest.mark.skipif(peak_memory_mb(torch.device("cpu")) is None, reason="no peak memory here")
@pytest.mark.parametrize("V", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_at_most_a_tenth_of_the_memory(V):
    """4,096 tokens: at V = 8,192 one tensor of logits is 134 MB, and the plain loss needs eight."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32, shape=(4, 1024), V=V)
    cpu, extra = torch.device("cpu"), []
    for loss in (
        lambda: by_chunks(hidden, head, teacher, labels, 1.0, 0.5)[0],
        lambda: plain_loss(hidden, head, teacher, labels),
    ):
        give_back_memory()  # what an earlier test freed would be used again, and not be seen
        reset_peak_memory()
        before = peak_memory_mb(cpu)
        loss().backward()
        extra.append(peak_memory_mb(cpu) - before)
    assert extra[1] > 4 * 4 * 4096 * V / 1e6
    assert extra[0] < 0.1 * extra[1]


def test_chunk_size():
    """CHUNK_LOGITS logits at once, or CHUNK tokens where that is more."""
    assert chunk_size(50) == CHUNK_LOGITS // 50
    assert chunk_size(CHUNK_LOGITS // CHUNK) == chunk_size(10**7) == CHUNK


def test_use_fused(capsys):
    """auto: above 256 MB of logits, and says so."""
    most = MOST_BYTES // 4 // 2048
    assert MOST_BYTES == 256 * 2**20
    assert use_fused("yes", 1, 10) is True
    assert use_fused("no", 10**6, 10**6) is False
    assert use_fused("auto", most, 2048) is False
    assert capsys.readouterr().out == ""
    assert use_fused("auto", most + 8192, 2048) is True
    assert "--fused: the logits of a batch would take 320 MB" in capsys.readouterr().out
