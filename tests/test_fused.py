"""The fused loss is the plain loss: the same value and gradients as `mixed_loss` on the logits, in
float64, for every mask, weight, temperature and alpha; and it never holds the logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from dataset.cache_teacher import top_k
from distill import HiddenTeacher, SparseTeacher, fused_mixed_loss, mixed_loss
from distill.fused import CHUNK
from run.setup import give_back_memory, peak_memory_mb, reset_peak_memory
from run.speed import compiler_for

B, S, V, D, E = 3, 7, 50, 12, 20


def tensors(seed=0, dtype=torch.float64, shape=(B, S), V=V):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    hidden, head = normal(*shape, D).requires_grad_(), normal(V, D).requires_grad_()
    labels = torch.randint(V, shape, generator=generator)
    labels[0, :3] = -100
    return hidden, head, HiddenTeacher(normal(*shape, E), normal(V, E)), labels


def logits_of(teacher):
    return teacher.hidden @ teacher.head.T


MASKS = {
    "none": None,
    "labelled": "labelled",
    "weights": torch.rand(B, S, generator=torch.Generator().manual_seed(1)),
    "some rows": torch.arange(B)[:, None].expand(B, S) == 1,
    "empty": torch.zeros(B, S, dtype=torch.bool),
}


def assert_same(first, second, inputs, tolerance=1e-9):
    """Equal values, and equal gradients of 3 * value (a factor that backward must not lose)."""
    torch.testing.assert_close(first, second, atol=tolerance, rtol=0)
    grads = [torch.autograd.grad(3 * value, inputs, retain_graph=True) for value in (first, second)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [4, CHUNK])
def test_value_and_gradients_are_the_plain_loss(mask, temperature, alpha, chunk):
    hidden, head, teacher, labels = tensors()
    mask = labels != -100 if mask == "labelled" else MASKS[mask]
    plain = mixed_loss(hidden @ head.T, logits_of(teacher), labels, mask, temperature, alpha)
    for says in (teacher, logits_of(teacher)):
        fused = fused_mixed_loss(hidden, head, says, labels, mask, temperature, alpha, chunk)
        assert_same(plain, fused, (hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_sample_of_every_token_is_the_plain_loss(temperature):
    hidden, head, teacher, labels = tensors()
    probs = (logits_of(teacher) / temperature).softmax(-1)
    everything = torch.arange(V).flip(0).expand(B, S, V)
    entropy = -(probs * probs.log()).sum(-1)
    says = SparseTeacher(everything, probs.flip(-1), entropy=entropy)
    plain = mixed_loss(hidden @ head.T, logits_of(teacher), labels, None, temperature, 0.4)
    fused = fused_mixed_loss(hidden, head, says, labels, None, temperature, 0.4, chunk=5)
    assert_same(plain, fused, (hidden, head))


@pytest.mark.parametrize("temperature, alpha, k", [(1.0, 0.0, 6), (2.0, 0.5, 1), (1.0, 0.5, V)])
def test_k_probabilities_and_a_tail(temperature, alpha, k):
    """Against autograd through the KL between the k + 1 buckets, written the long way."""
    hidden, head, teacher, labels = tensors()
    probs, ids = (logits_of(teacher) / temperature).softmax(-1).topk(k)
    says = SparseTeacher(ids, probs, tail=(1 - probs.sum(-1)).clamp(min=0))
    logits = hidden @ head.T
    student = (logits / temperature).softmax(-1)
    kept = torch.zeros(B, S, V, dtype=torch.bool).scatter(-1, ids, True)
    student_tail = torch.where(kept, 0.0, student).sum(-1)
    divergence = (probs * (probs / student.gather(-1, ids)).log()).sum(-1)
    if k < V:
        divergence = divergence + says.tail * (says.tail / student_tail).log()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected = (1 - alpha) * temperature**2 * divergence[labels != -100].mean()
    expected = expected + alpha * cross_entropy
    fused = fused_mixed_loss(hidden, head, says, labels, None, temperature, alpha, chunk=4)
    assert_same(expected, fused, (hidden, head))


def test_a_tail_loses_information_and_nothing_else():
    """Merging tokens into one bucket can only lower a KL (the data-processing inequality)."""
    hidden, head, teacher, labels = tensors()
    values = []
    for k in (1, 4, 16, V):
        probs, ids = logits_of(teacher).softmax(-1).topk(k)
        says = SparseTeacher(ids, probs, tail=(1 - probs.sum(-1)).clamp(min=0))
        values.append(fused_mixed_loss(hidden, head, says, labels, alpha=0.0).item())
    whole = mixed_loss(hidden @ head.T, logits_of(teacher), labels, alpha=0.0).item()
    assert values == sorted(values) and values[0] < values[-1]
    assert values[-1] == pytest.approx(whole, abs=1e-9)


def test_a_kept_token_of_probability_0_adds_nothing():
    """A mark of a sample may fall on one, and float16 rounds small ones to 0: 0 log 0 = 0."""
    hidden, head, _, labels = tensors()
    values = []
    for k in (2, 3):
        ids = torch.arange(k).expand(B, S, k)
        probs = torch.tensor([0.75, 0.25, 0.0][:k], dtype=torch.float64).expand(B, S, k)
        entropy = torch.zeros(B, S, dtype=torch.float64)
        says = SparseTeacher(ids, probs, entropy=entropy)
        values.append(fused_mixed_loss(hidden, head, says, labels, alpha=0.0))
    assert_same(*values, (hidden, head))


def test_without_a_teacher_it_is_cross_entropy():
    hidden, head, _, labels = tensors()
    fused = fused_mixed_loss(hidden, head, None, labels, alpha=1.0, chunk=4)
    plain = F.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten())
    assert_same(plain, fused, (hidden, head))


def test_labels_are_not_needed_at_alpha_0():
    hidden, head, teacher, _ = tensors()
    plain = mixed_loss(hidden @ head.T, logits_of(teacher), None, torch.ones(B, S), 2.0, 0.0)
    assert_same(
        plain, fused_mixed_loss(hidden, head, teacher, None, None, 2.0, 0.0), (hidden, head)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_stands_at_masked_tokens_does_not_matter(bad):
    hidden, head, teacher, labels = tensors()
    mask = torch.ones(B, S)
    mask[2, 3:] = 0
    expected = fused_mixed_loss(hidden, head, teacher, labels, mask)
    spoilt, spoilt_teacher = hidden.detach().clone(), teacher.hidden.clone()
    spoilt[2, 3:], spoilt_teacher[2, 3:] = bad, bad
    spoilt.requires_grad_()
    says = HiddenTeacher(spoilt_teacher, teacher.head)
    fused = fused_mixed_loss(spoilt, head, says, labels, mask)
    assert torch.equal(fused, expected)
    fused.backward()
    assert spoilt.grad.isfinite().all() and head.grad.isfinite().all()
    assert (spoilt.grad[2, 3:] == 0).all()


def test_the_teacher_gets_no_gradient():
    hidden, head, teacher, labels = tensors()
    teacher.hidden.requires_grad_(), teacher.head.requires_grad_()
    fused_mixed_loss(hidden, head, teacher, labels).backward()
    assert teacher.hidden.grad is None and teacher.head.grad is None


def test_frozen_head_and_frozen_body():
    """LoRA freezes heads, probes freeze bodies: the other gradient is the same without it."""
    hidden, head, teacher, labels = tensors()
    both = torch.autograd.grad(fused_mixed_loss(hidden, head, teacher, labels), (hidden, head))
    alone = fused_mixed_loss(hidden, head.detach(), teacher, labels)
    assert torch.equal(torch.autograd.grad(alone, hidden)[0], both[0])
    alone = fused_mixed_loss(hidden.detach(), head, teacher, labels)
    assert torch.equal(torch.autograd.grad(alone, head)[0], both[1])


def test_tied_head():
    """The head's gradient adds to what the same weight gets as an embedding."""
    _, head, teacher, labels = tensors()
    ids = labels.clamp(min=0)
    fused = fused_mixed_loss(head[ids], head, teacher, labels)
    plain = mixed_loss(head[ids] @ head.T, logits_of(teacher), labels)
    assert_same(plain, fused, (head,))


def test_a_token_that_only_the_student_rules_out_costs_infinitely_much():
    """p > 0 where q = 0; where both are 0 there is nothing to learn, and no NaN."""
    logits, probs = torch.zeros(2, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2)
    logits[0, 1] = logits[1, 2] = -torch.inf
    for row, infinite in ((0, True), (1, False)):
        log_probs = logits[row].log_softmax(-1)[None, None]
        says = probs[row].log()[None, None]
        loss = fused_mixed_loss(
            torch.ones(1, 1, 1), log_probs[0].T.clone().requires_grad_(), says, None, alpha=0.0
        )
        assert loss.isinf() if infinite else loss.isfinite()


def test_bfloat16_autocast_sums_in_float32():
    """Products in bfloat16, as of the plain loss under autocast; sums and loss in float32."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32, shape=(4, 300))
    exact = mixed_loss(hidden @ head.T, logits_of(teacher), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fused_mixed_loss(hidden, head, teacher, labels, chunk=16)
        plain = mixed_loss(F.linear(hidden, head), F.linear(teacher.hidden, teacher.head), labels)
    assert fused.dtype == torch.float32
    assert fused.item() == pytest.approx(plain.item(), rel=1e-3)
    whole = fused_mixed_loss(hidden, head, teacher, labels, chunk=16)
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
    assert errors[1][1] < 1.2 * errors[0][1] < 0.05  # 75 chunks summed: no worse than one product


def test_compiled():
    hidden, head, teacher, labels = tensors(dtype=torch.float32)

    def loss(hidden, head):
        return fused_mixed_loss(2 * hidden, head, teacher, labels, None, 2.0, 0.5, chunk=8)

    compiled = torch.compile(loss, backend="aot_eager")
    assert_same(loss(hidden, head), compiled(hidden, head), (hidden, head), 1e-5)


@pytest.mark.skipif(not compiler_for(torch.device("cpu")), reason="no C++ compiler here")
def test_compiled_chunks():
    """All kinds of teacher; the last chunk is shorter than the others."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32)
    ids, probs, rest = top_k(logits_of(teacher).log_softmax(-1), 4)
    sparse = SparseTeacher(ids, probs.exp(), tail=rest.exp())
    for says, temperature, alpha in ((teacher, 2.0, 0.5), (sparse, 1.0, 0.3), (None, 1.0, 1.0)):
        loss, compiled = (
            fused_mixed_loss(hidden, head, says, labels, None, temperature, alpha, 5, flag)
            for flag in (False, True)
        )
        assert_same(loss, compiled, (hidden, head), 1e-5)


@pytest.mark.skipif(peak_memory_mb(torch.device("cpu")) is None, reason="no peak memory here")
def test_the_logits_never_exist():
    """4,096 tokens x 8,192: one tensor of logits is 134 MB, and the plain loss needs several."""
    hidden, head, teacher, labels = tensors(dtype=torch.float32, shape=(4, 1024), V=8192)
    cpu, extra = torch.device("cpu"), []
    for loss in (
        lambda: fused_mixed_loss(hidden, head, teacher, labels),
        lambda: mixed_loss(hidden @ head.T, logits_of(teacher), labels),
    ):
        give_back_memory()  # what an earlier test freed would be used again, and not be seen
        reset_peak_memory()
        before = peak_memory_mb(cpu)
        loss().backward()
        extra.append(peak_memory_mb(cpu) - before)
    assert extra[0] < 100 and extra[1] > 500


def test_bad_arguments():
    hidden, head, teacher, labels = tensors()
    with pytest.raises(ValueError, match="alpha 1.5 must be between 0"):
        fused_mixed_loss(hidden, head, teacher, labels, alpha=1.5)
    with pytest.raises(ValueError, match="temperature 0.0 must be a positive number"):
        fused_mixed_loss(hidden, head, teacher, labels, temperature=0.0)
    with pytest.raises(ValueError, match="needs labels"):
        fused_mixed_loss(hidden, head, teacher, None)
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        fused_mixed_loss(hidden, head, None, labels)
    other = HiddenTeacher(teacher.hidden, teacher.head[:-1])
    with pytest.raises(ValueError, match="teacher vocabulary 49 != student vocabulary 50"):
        fused_mixed_loss(hidden, head, other, labels)
