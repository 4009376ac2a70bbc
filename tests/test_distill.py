"""The logit losses are the formulas of distill/logits.py: checked against values worked by hand,
torch's library, the gradient T * (q - p) / N, and against everything that must not change them
(padding, the order of a batch, cutting it into micro-batches)."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill import cross_entropy, distillation_loss, kl_divergence, mixed_loss
from model import ModelConfig, Transformer
from run import batches
from run.batches import COLUMNS, PLACES, microbatches, places_in_use

IGNORE = -100
LN = math.log


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def random_labels(B, S, V, seed=0):
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))


def logits_of(*probabilities):
    """(1, 1, V) logits whose softmax is `probabilities`, shifted: a softmax ignores a shift."""
    return torch.tensor([[[LN(p) for p in probabilities]]], dtype=torch.float64) + 3.0


def slow_kl(student_logits, teacher_logits, temperature):
    """KL(teacher || student) of two lists of V logits, in Python floats."""
    student = [math.exp(z / temperature) for z in student_logits]
    teacher = [math.exp(z / temperature) for z in teacher_logits]
    student = [value / sum(student) for value in student]
    teacher = [value / sum(teacher) for value in teacher]
    return sum(p * LN(p / q) for p, q in zip(teacher, student, strict=True))


ROOT3 = math.sqrt(3)


@pytest.mark.parametrize(
    "teacher, student, temperature, expected",
    [
        # 3/4 ln(3/4 : 1/2) + 1/4 ln(1/4 : 1/2)
        ((0.75, 0.25), (0.5, 0.5), 1.0, 0.75 * LN(1.5) + 0.25 * LN(0.5)),
        # The other direction is another number: 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4)
        ((0.5, 0.5), (0.75, 0.25), 1.0, 0.5 * LN(2 / 3) + 0.5 * LN(2)),
        # T = 2 takes the roots: 3 : 1 becomes sqrt(3) : 1; then times T^2 = 4
        (
            (0.75, 0.25),
            (0.5, 0.5),
            2.0,
            4 * (ROOT3 * LN(2 * ROOT3 / (1 + ROOT3)) + LN(2 / (1 + ROOT3))) / (1 + ROOT3),
        ),
        # T = 1/2 squares: 3 : 1 becomes 9 : 1; then times 1/4
        ((0.75, 0.25), (0.5, 0.5), 0.5, 0.25 * (0.9 * LN(1.8) + 0.1 * LN(0.2))),
        # 1/8 ln(1/8 : 1/2) + 1/4 ln 1 + 5/8 ln(5/8 : 1/4)
        (
            (0.125, 0.25, 0.625),
            (0.5, 0.25, 0.25),
            1.0,
            0.125 * LN(0.25) + 0.625 * LN(2.5),
        ),
    ],
)
def test_values_worked_by_hand(teacher, student, temperature, expected):
    loss = distillation_loss(logits_of(*student), logits_of(*teacher), temperature=temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_a_slow_implementation_and_torch(temperature):
    student, teacher = random_logits(2, 3, 5, seed=1), random_logits(2, 3, 5, seed=2)
    loss = distillation_loss(student, teacher, temperature=temperature).item()
    slow = [
        slow_kl(student[b, s].tolist(), teacher[b, s].tolist(), temperature)
        for b in range(2)
        for s in range(3)
    ]
    assert loss == pytest.approx(temperature**2 * sum(slow) / 6, rel=1e-12)
    library = F.kl_div(
        (student / temperature).log_softmax(-1).flatten(0, 1),
        (teacher / temperature).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",  # a per-token mean on (N, V)
        log_target=True,
    )
    assert loss == pytest.approx(temperature**2 * library.item(), rel=1e-12)


def test_the_kl_of_every_token_has_no_temperature_factor():
    student, teacher = random_logits(2, 3, 5, seed=1), random_logits(2, 3, 5, seed=2)
    per_token = kl_divergence(student, teacher, 3.0)
    assert per_token.shape == (2, 3)
    assert per_token[1, 2].item() == pytest.approx(
        slow_kl(student[1, 2].tolist(), teacher[1, 2].tolist(), 3.0), rel=1e-12
    )


def test_a_bool_mask_picks_tokens():
    student, teacher = random_logits(2, 3, 5, seed=1), random_logits(2, 3, 5, seed=2)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    per_token = [
        slow_kl(student[b, s].tolist(), teacher[b, s].tolist(), 2.0)
        for b, s in ((0, 0), (1, 0), (1, 1))
    ]
    loss = distillation_loss(student, teacher, mask, temperature=2.0)
    assert loss.item() == pytest.approx(4 * sum(per_token) / 3, rel=1e-12)


def test_a_weight_mask_is_a_weighted_mean():
    student, teacher = random_logits(1, 3, 5, seed=1), random_logits(1, 3, 5, seed=2)
    kl = [slow_kl(student[0, s].tolist(), teacher[0, s].tolist(), 1.0) for s in range(3)]
    weights = torch.tensor([[1.0, 0.0, 10.0]])
    loss = distillation_loss(student, teacher, weights)
    assert loss.item() == pytest.approx((kl[0] + 10 * kl[2]) / 11, rel=1e-12)


def test_a_masked_value_that_is_not_finite_does_not_count():
    student, teacher = random_logits(1, 3, 5, seed=1), random_logits(1, 3, 5, seed=2)
    mask = torch.tensor([[True, True, False]])
    clean = distillation_loss(student[:, :2], teacher[:, :2])
    student[0, 2], teacher[0, 2] = float("nan"), float("inf")
    assert distillation_loss(student, teacher, mask).item() == pytest.approx(
        clean.item(), rel=1e-12
    )


def test_large_temperature_limit():
    """T^2 KL -> (1 / 2V) * sum_v (dz_v - mean dz)^2: matching logits, up to a shift."""
    student, teacher = random_logits(2, 3, 7, seed=3), random_logits(2, 3, 7, seed=4)
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdim=True)
    limit = centred.pow(2).sum(-1).mean() / (2 * 7)
    loss = distillation_loss(student, teacher, temperature=1e4)
    assert loss.item() == pytest.approx(limit.item(), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 5.0])
def test_gradient_is_t_times_the_difference_of_probabilities(temperature):
    student = random_logits(2, 4, 6, seed=5).requires_grad_()
    teacher = random_logits(2, 4, 6, seed=6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    distillation_loss(student, teacher, mask, temperature).backward()
    difference = (student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    expected = temperature * difference * mask[..., None] / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-13)


def test_gradient_against_finite_differences():
    student = random_logits(1, 2, 3, seed=5).requires_grad_()
    teacher, labels = random_logits(1, 2, 3, seed=6), torch.tensor([[2, IGNORE]])
    assert torch.autograd.gradcheck(
        lambda logits: mixed_loss(logits, teacher, labels, temperature=2.0, alpha=0.3), (student,)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_equal_distributions_give_zero(temperature):
    teacher = random_logits(2, 3, 5).float()
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6
    shifted = distillation_loss(student + 7.0, teacher, temperature=temperature)
    assert abs(shifted.item()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    """In bfloat16 itself some of these divergences come out below -1e-3."""
    teacher = random_logits(4, 16, 64, seed=7).to(dtype)
    student = (teacher.double() + random_logits(4, 16, 64, seed=8, scale=0.01)).to(dtype)
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    exact = distillation_loss(student.double(), teacher.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-7)
    assert kl_divergence(student, teacher, 1.0).min() > -1e-6
    labels = random_labels(4, 16, 64)
    per_token = cross_entropy(student, labels)
    assert per_token.dtype == torch.float32
    library = F.cross_entropy(student.double().flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(per_token.flatten().double(), library, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64():
    student, teacher = random_logits(1, 2, 3, seed=1), random_logits(1, 2, 3, seed=2)
    assert distillation_loss(student, teacher).dtype == torch.float64


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_teacher_gets_no_gradient(alpha):
    student = random_logits(2, 3, 5, seed=1).requires_grad_()
    teacher = random_logits(2, 3, 5, seed=2).requires_grad_()
    mixed_loss(student, teacher, random_labels(2, 3, 5), alpha=alpha).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_no_valid_token_gives_zero_with_a_gradient_path(alpha):
    student = random_logits(2, 3, 5, seed=1).requires_grad_()
    labels = torch.full((2, 3), IGNORE)
    loss = mixed_loss(student, random_logits(2, 3, 5, seed=2), labels, alpha=alpha)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 2, 5), (1, 3, 5), (3, 5)])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(random_logits(2, 3, 5), random_logits(*shape))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures_are_refused(temperature):
    logits = random_logits(1, 2, 3)
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(logits, logits, temperature=temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_alphas_are_refused(alpha):
    logits = random_logits(1, 2, 3)
    with pytest.raises(ValueError, match="alpha"):
        mixed_loss(logits, logits, torch.zeros(1, 2, dtype=torch.long), alpha=alpha)


def test_cross_entropy_of_every_token():
    logits, labels = random_logits(2, 4, 5), random_labels(2, 4, 5)
    labels[0, 1] = labels[1, 3] = IGNORE
    library = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels), library.view(2, 4))
    # -ln(1/4) and -ln(3/4)
    by_hand = cross_entropy(logits_of(0.75, 0.25).expand(1, 2, 2), torch.tensor([[1, 0]]))
    assert by_hand.tolist()[0] == pytest.approx([LN(4), LN(4 / 3)])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mixed_loss_is_alpha_ce_plus_the_rest_kd(alpha, temperature):
    student, teacher = random_logits(2, 4, 5, seed=1), random_logits(2, 4, 5, seed=2)
    labels = random_labels(2, 4, 5)
    labels[0, 2:] = IGNORE  # 6 of 8 tokens are valid, for both halves
    valid = [(b, s) for b in range(2) for s in range(4) if labels[b, s] != IGNORE]
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten()).item()
    kl = [slow_kl(student[at].tolist(), teacher[at].tolist(), temperature) for at in valid]
    expected = alpha * ce + (1 - alpha) * temperature**2 * sum(kl) / 6
    loss = mixed_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_mixed_loss_weighs_both_halves_with_the_mask():
    student, teacher = random_logits(1, 3, 5, seed=1), random_logits(1, 3, 5, seed=2)
    labels, weights = random_labels(1, 3, 5), torch.tensor([[2.0, 0.0, 6.0]])
    ce = F.cross_entropy(student[0], labels[0], reduction="none").tolist()
    kl = [slow_kl(student[0, s].tolist(), teacher[0, s].tolist(), 1.0) for s in range(3)]
    expected = (2 * (0.3 * ce[0] + 0.7 * kl[0]) + 6 * (0.3 * ce[2] + 0.7 * kl[2])) / 8
    loss = mixed_loss(student, teacher, labels, weights, alpha=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_alpha_one_needs_no_teacher():
    logits, labels = random_logits(2, 4, 5), random_labels(2, 4, 5)
    labels[1, 1:] = IGNORE
    loss = mixed_loss(logits, None, labels, alpha=1.0)
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    )


def test_alpha_zero_needs_no_labels():
    student, teacher = random_logits(2, 3, 5, seed=1), random_logits(2, 3, 5, seed=2)
    loss = mixed_loss(student, teacher, None, alpha=0.0, temperature=2.0)
    library = F.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none"
    ).sum(-1)
    assert loss.item() == pytest.approx(4 * library.mean().item(), rel=1e-6)


def test_an_ignored_label_is_ignored_whatever_the_mask_says():
    """-100 is ignored everywhere: a mask that is true there must not thin out the mean."""
    logits, labels = random_logits(1, 4, 5), random_labels(1, 4, 5)
    labels[0, 2:] = IGNORE
    loss = mixed_loss(logits, None, labels, torch.ones(1, 4), alpha=1.0)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0], labels[0]).item(), rel=1e-6)


# Promise: padding, the order of a batch and cutting it change neither the loss nor the gradient.


def tiny_model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return Transformer(config)


def uneven_batch():
    """ids, teacher logits, labels (6, 7): rows with 7, 1, 4, 0, 2 and 6 valid labels."""
    ids, labels = random_labels(6, 7, 13, seed=1), random_labels(6, 7, 13, seed=2)
    for row, count in enumerate((7, 1, 4, 0, 2, 6)):
        labels[row, count:] = IGNORE
    return ids, random_logits(6, 7, 13, seed=3).float(), labels


def gradients(parts, *, weighted=True):
    """Loss and gradient of a model after a step of (ids, teacher, labels, share) parts."""
    student = tiny_model()
    total = 0.0
    for ids, teacher, labels, share in parts:
        part = mixed_loss(student(ids), teacher, labels, temperature=2.0, alpha=0.4)
        part = part * (share if weighted else 1 / len(parts))
        part.backward()
        total += part.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def assert_same_step(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


def test_right_padding_changes_nothing():
    ids, teacher, labels = uneven_batch()
    expected = gradients([(ids, teacher, labels, 1.0)])
    padded = (
        F.pad(ids, (0, 5), value=0),
        F.pad(teacher, (0, 0, 0, 5), value=9.0),
        F.pad(labels, (0, 5), value=IGNORE),
    )
    assert_same_step(gradients([(*padded, 1.0)]), expected)


def test_batch_order_changes_nothing():
    batch = uneven_batch()
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    shuffled = tuple(tensor[order] for tensor in batch)
    assert_same_step(gradients([(*shuffled, 1.0)]), gradients([(*batch, 1.0)]))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
def test_microbatches_sum_to_the_whole_batch(parts):
    """4 parts of 6 rows are uneven, and with 6 parts one of them has no valid token at all."""
    batch = uneven_batch()
    pieces = list(microbatches(batch, (batch[2] != IGNORE).float(), parts))
    assert sum(int((labels != IGNORE).sum()) for _, _, labels, _ in pieces) == 20
    assert sum(float(share) for *_, share in pieces) == pytest.approx(1.0)
    assert_same_step(gradients(pieces), gradients([(*batch, 1.0)]))


def test_averaging_the_means_of_microbatches_would_be_another_loss():
    batch = uneven_batch()
    pieces = list(microbatches(batch, (batch[2] != IGNORE).float(), 3))
    whole, naive = gradients([(*batch, 1.0)]), gradients(pieces, weighted=False)
    assert abs(whole[0] - naive[0]) > 1e-2
    assert (whole[1] - naive[1]).norm() > 0.05 * whole[1].norm()


def test_microbatches_by_hand(monkeypatch):
    """Shares are of the weight, 3 and 13 of 16; what nothing counts right of is cut off."""
    monkeypatch.setattr(batches, "COLUMNS", 1)
    ids = torch.arange(12).view(4, 3)
    weights = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0], [10.0, 0, 3.0]])
    (first, share), (second, other_share) = microbatches((ids,), weights, 2)
    assert first.tolist() == [[0, 1], [3, 4]]
    assert second.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert (float(share), float(other_share)) == pytest.approx((3 / 16, 13 / 16))


def test_microbatches_without_a_weight_are_left_out():
    """They would add a gradient of 0, and a share of 0 / 0 where the whole batch is empty."""
    ids, weights = torch.arange(8).view(4, 2), torch.ones(4, 2)
    weights[1] = 0
    kept = [piece.tolist() for piece, _ in microbatches((ids,), weights, 4)]
    assert kept == [[[0, 1]], [[4, 5]], [[6, 7]]]
    assert list(microbatches((ids,), torch.zeros(4, 2), 2)) == []


def test_pieces_are_cut_at_few_widths():
    """A piece ends after its last token that counts, at a multiple of COLUMNS, or at the end."""
    ids = torch.arange(4 * 70).view(4, 70)
    weights = torch.zeros(4, 70)
    for row, last in enumerate((0, COLUMNS - 1, COLUMNS, 69)):
        weights[row, last] = 1.0
    widths = [piece.shape[1] for piece, _ in microbatches((ids,), weights, 4)]
    assert widths == [COLUMNS, COLUMNS, 2 * COLUMNS, 70]


@pytest.mark.parametrize("count", [0, 1, PLACES, PLACES + 1, 300])
def test_places_in_use(count):
    """All that weigh, in their order, then zeros up to a multiple of PLACES or the end."""
    generator = torch.Generator().manual_seed(count)
    weights = torch.zeros(3, 100).flatten()
    weights[torch.randperm(300, generator=generator)[:count]] = 0.5
    places = places_in_use(weights.view(3, 100))
    assert places[:count].tolist() == weights.nonzero()[:, 0].tolist()
    assert not weights[places[count:]].any()
    assert len(places) == min(-(-count // PLACES) * PLACES, 300) == len(set(places.tolist()))
