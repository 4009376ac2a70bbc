"""Several teachers: what they say together worked by hand, one teacher as lesson 2, the weights
that labels choose, and the mistakes that other projects shipped."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_distillation
from distill.mixture import mixture_weights
from files import read_json
from methods import ensemble
from methods.ensemble import compute_loss
from model import make_or_load, save_model
from tests.explain import check
from tests.short_runs import SIX, check_resume, logged, run, same_bits

LN = math.log
IGNORE = -100
HALVES = torch.tensor([0.5, 0.5], dtype=torch.double)
COMBINE = ("mixture", "product")


def logits_of(*probabilities):
    """(1, 1, V) logits whose softmax is `probabilities`, shifted: a softmax ignores a shift."""
    return torch.tensor([[[LN(p) for p in probabilities]]], dtype=torch.double) + 2.0


def random_logits(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def batch(K=3, B=2, S=4, V=5, ignored=True):
    """student (B, S, V), teachers (K, B, S, V), labels (B, S)."""
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
    if ignored:
        labels[0, 2:] = labels[1, 0] = IGNORE
    return random_logits(B, S, V, seed=1), random_logits(K, B, S, V, seed=2), labels


def equal_weights(K):
    return torch.full((K,), 1 / K, dtype=torch.double)


def loss_of(student, logits, labels, combine="mixture", T=1.0, alpha=0.0, most=None, weights=None):
    weights = equal_weights(len(logits)) if weights is None else weights
    return compute_loss(student, logits, weights, labels, combine, T, alpha, most)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# By hand: teachers (4/5, 1/5) and (1/2, 1/2), a student (1/2, 1/2), label 0.

TWO = torch.stack([logits_of(0.8, 0.2), logits_of(0.5, 0.5)])
STUDENT, LABEL = logits_of(0.5, 0.5), torch.tensor([[0]])
MIXTURE = 0.65 * LN(1.3) + 0.35 * LN(0.7)  # of (0.65, 0.35)
PRODUCT = 2 / 3 * LN(4 / 3) + 1 / 3 * LN(2 / 3)  # sqrt(0.8 * 0.5) : sqrt(0.2 * 0.5) is 2 : 1
FIRST = 0.8 * LN(1.6) + 0.2 * LN(0.4)  # of the first teacher; the second one's is 0
MISTAKES = {
    "the KLs of K teachers are summed (as in EasyDistill): K times their mean": FIRST,
    "the mean of K KLs: the mixture's gradient, but J too large": FIRST / 2,
    "only the last teacher counts": 0.0,
    "logits are averaged where probabilities should be": PRODUCT,
    "probabilities are averaged where logits should be": MIXTURE,
}


@pytest.mark.parametrize("combine, expected", [("mixture", MIXTURE), ("product", PRODUCT)])
def test_two_teachers_by_hand(combine, expected):
    loss, parts = loss_of(STUDENT, TWO, LABEL, combine)
    check(loss, expected, {k: v for k, v in MISTAKES.items() if v != expected})
    entropy = -(0.8 * LN(0.8) + 0.2 * LN(0.2))
    J = -(0.65 * LN(0.65) + 0.35 * LN(0.35)) - (entropy + LN(2)) / 2
    check(parts["disagreement"], J, {"the mean of entropies alone": (entropy + LN(2)) / 2}, 1e-9)
    loss, _ = loss_of(STUDENT, TWO, LABEL, combine, alpha=0.3)
    check(loss, 0.3 * LN(2) + 0.7 * expected, {"alpha on the KL": 0.7 * LN(2) + 0.3 * expected})


def test_weights_by_hand():
    """1/3 and 2/3: (0.6, 0.4); and 0.8^(1/3) 0.5^(2/3) : 0.2^(1/3) 0.5^(2/3) = 4^(1/3) : 1."""
    weights = torch.tensor([1 / 3, 2 / 3], dtype=torch.double)
    loss, parts = loss_of(STUDENT, TWO, LABEL, weights=weights)
    assert loss.item() == pytest.approx(0.6 * LN(1.2) + 0.4 * LN(0.8), rel=1e-6)
    first, whole = -(0.8 * LN(0.8) + 0.2 * LN(0.2)), -(0.6 * LN(0.6) + 0.4 * LN(0.4))
    J = whole - first / 3 - 2 * LN(2) / 3
    check(parts["disagreement"], J, {"weights left out": whole - first / 2 - LN(2) / 2}, 1e-9)
    first = 4 ** (1 / 3) / (1 + 4 ** (1 / 3))
    loss, _ = loss_of(STUDENT, TWO, LABEL, "product", weights=weights)
    assert loss.item() == pytest.approx(first * LN(2 * first) + (1 - first) * LN(2 - 2 * first))


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("combine", COMBINE)
def test_equals_torchs_own_kl(combine, T):
    student, logits, labels = batch()
    target = (logits / T).softmax(-1).mean(0)
    target = (logits.mean(0) / T).softmax(-1) if combine == "product" else target
    kl = F.kl_div((student / T).log_softmax(-1), target, reduction="none").sum(-1)
    expected = 0.7 * T**2 * kl[labels != IGNORE].mean() + 0.3 * F.cross_entropy(
        student.flatten(0, 1), labels.flatten()
    )
    found = loss_of(student, logits, labels, combine, T, alpha=0.3)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_mean_of_kls_is_the_mixtures_and_j():
    """mean_k KL(p_k || q) = KL(mixture || q) + J: the same gradient. Their sum is the defect."""
    student, logits, labels = batch()
    student.requires_grad_()
    of_each = [loss_of(student, one[None], labels)[0] for one in logits]
    loss, parts = loss_of(student, logits, labels)
    assert (sum(of_each) / 3).item() == pytest.approx((loss + parts["disagreement"]).item())
    ours, summed = gradient(loss, student), gradient(sum(of_each), student)
    torch.testing.assert_close(summed / 3, ours)
    assert (summed - ours).abs().max() > 0.1, "K summed losses weigh K times as much"


def test_what_other_projects_did_is_told_from_ours():
    student, logits, labels = batch()
    right = {combine: loss_of(student, logits, labels, combine)[0].item() for combine in COMBINE}
    last = loss_of(student, logits[-1:], labels)[0].item()  # as verl: one name, one teacher left
    summed = sum(loss_of(student, one[None], labels)[0].item() for one in logits)
    values = [*right.values(), last, summed, summed / 3]
    assert all(abs(a - b) > 0.01 for i, a in enumerate(values) for b in values[:i]), values


# One teacher.


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("most", [None, 0.0])
@pytest.mark.parametrize("T, alpha", [(1.0, 0.5), (3.0, 0.2), (1.0, 0.0)])
def test_one_teacher_is_lesson_2_to_the_bit(combine, most, T, alpha):
    student, logits, labels = (x.float() if x.is_floating_point() else x for x in batch(1))
    student.requires_grad_()
    weights = torch.ones(1)
    expected = train_distillation.compute_loss(student, logits[0], labels, T, alpha)[0]
    found, parts = loss_of(student, logits, labels, combine, T, alpha, most, weights)
    assert torch.equal(found, expected)
    assert torch.equal(gradient(found, student), gradient(expected, student))
    assert parts["disagreement"] == 0 and parts["kept"] == 1


# The filter.


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_where_teachers_disagree_the_label_decides(alpha):
    """Two tokens: teachers that agree more or less, and teachers that say the opposite."""
    logits = torch.stack(
        [torch.cat([logits_of(0.8, 0.2), logits_of(p, 1 - p)], dim=1) for p in (0.9, 0.1)]
    )
    student, labels = STUDENT.repeat(1, 2, 1), torch.tensor([[0, 0]])
    opposite = LN(2) + 0.9 * LN(0.9) + 0.1 * LN(0.1)  # J of the second token, 0.368
    for most, kept in ((0.3, 0.5), (0.4, 1.0)):
        loss, parts = loss_of(student, logits, labels, alpha=alpha, most=most)
        assert parts["disagreement"].item() == pytest.approx(opposite / 2)
        assert parts["kept"].item() == kept
        # The mixture of the opposites is the student's (1/2, 1/2): its KL is 0.
        label = LN(2) if most == 0.3 else alpha * LN(2)
        taught = alpha * LN(2) + (1 - alpha) * FIRST
        check(loss, (taught + label) / 2, {"a mean over the kept tokens alone": taught})


def test_at_threshold_0_teachers_that_differ_do_not_count():
    student, logits, labels = batch()
    plain = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    for combine in COMBINE:
        loss, parts = loss_of(student, logits, labels, combine, 2.0, 0.3, most=0.0)
        assert parts["kept"] == 0 and loss.item() == pytest.approx(plain.item(), rel=1e-12)
        unfiltered = loss_of(student, logits, labels, combine, 2.0, 0.3)[0]
        assert torch.equal(
            loss_of(student, logits, labels, combine, 2.0, 0.3, 100.0)[0], unfiltered
        )


def test_disagreement_is_between_0_and_the_log_of_k():
    student, logits, labels = batch(ignored=False)
    same = logits[:1].expand_as(logits)
    assert loss_of(student, same, labels)[1]["disagreement"].item() == pytest.approx(0, abs=1e-12)
    certain = 60 * F.one_hot(torch.arange(3), 5).double().view(3, 1, 1, 5).expand_as(logits)
    found = loss_of(student, certain, labels)[1]["disagreement"].item()
    assert found == pytest.approx(LN(3), rel=1e-9)


# Gradients, and what must not change the loss.


@pytest.mark.parametrize("combine", COMBINE)
def test_gradients(combine):
    """Against finite differences, and T (q - p) / N by hand."""
    student, logits, labels = batch(S=3, V=4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: loss_of(z, logits, labels, combine, 2.0, 0.3, 0.5)[0], student
    )
    p = (logits / 2).softmax(-1).mean(0)
    p = (logits.mean(0) / 2).softmax(-1) if combine == "product" else p
    valid = (labels != IGNORE)[..., None]
    expected = 2 * ((student.detach() / 2).softmax(-1) - p) * valid / valid.sum()
    found = gradient(loss_of(student, logits, labels, combine, 2.0)[0], student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", COMBINE)
def test_a_token_that_teachers_rule_out(combine):
    """One teacher's -inf: the mixture halves the token, the product denies it; nothing is NaN."""
    student, logits, labels = batch(2)
    logits[0, ..., 3] = -math.inf
    near = loss_of(student, logits.clamp(min=-1e5), labels, combine, alpha=0.3, most=0.2)
    student.requires_grad_()
    loss, parts = loss_of(student, logits, labels, combine, alpha=0.3, most=0.2)
    assert loss.item() == pytest.approx(near[0].item(), rel=1e-9)
    assert gradient(loss, student).isfinite().all()
    assert parts["disagreement"].item() == pytest.approx(near[1]["disagreement"].item())


@pytest.mark.parametrize("combine", COMBINE)
def test_ignored_tokens_and_micro_batches(combine):
    student, logits, labels = batch()
    knobs = (combine, 2.0, 0.3, 0.2)
    whole, parts = loss_of(student, logits, labels, *knobs)
    rows = [loss_of(student[i, None], logits[:, i, None], labels[i, None], *knobs) for i in (0, 1)]
    mean = (2 * rows[0][0] + 3 * rows[1][0]) / 5
    torch.testing.assert_close(whole, mean, msg="rows count by their tokens, 2 and 3")
    kept = (2 * rows[0][1]["kept"] + 3 * rows[1][1]["kept"]) / 5
    assert parts["kept"].item() == pytest.approx(kept.item())
    student[labels == IGNORE] = logits[:, labels == IGNORE] = math.nan
    assert torch.equal(loss_of(student, logits, labels, *knobs)[0], whole)


# Weights from labels.


def test_weights_by_em_worked_by_hand():
    """A is certain of 2 of 3 labels, B of the third: 2/3 and 1/3. Equal teachers stay equal."""
    sure = torch.tensor([[1.0, 1.0, 1e-30], [1e-30, 1e-30, 1.0]]).double()
    torch.testing.assert_close(mixture_weights(-sure.log()).tolist(), [2 / 3, 1 / 3])
    assert mixture_weights(torch.ones(4, 5)).tolist() == [0.25] * 4
    assert mixture_weights(torch.rand(1, 9)).tolist() == [1.0]


def test_em_finds_the_likeliest_mixture():
    p = np.random.default_rng(0).dirichlet((1.0, 1.0), size=40)  # (N, K): of 40 labels
    p[:, 1] *= 0.8
    grid = np.linspace(0.0005, 0.9995, 1000)[:, None]
    likelihood = np.log(grid * p[:, 0] + (1 - grid) * p[:, 1]).mean(1)
    best = grid[likelihood.argmax(), 0]
    weights = mixture_weights(torch.from_numpy(-np.log(p.T)))
    assert 0.1 < best < 0.9 and weights.sum().item() == pytest.approx(1)
    assert weights[0].item() == pytest.approx(best, abs=2e-3)


# The command.


def opinionated(module):
    if isinstance(module, torch.nn.Linear):
        module.weight *= 10  # so that the layers outweigh the embedding


@pytest.fixture(scope="module")
def teachers(prepared_folder, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("teachers") / name for name in "AB"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = make_or_load("nano", 400)
        model.model.layers.requires_grad_(False).apply(opinionated)
        model.model.norm.weight.data *= 5
        save_model(model, folder, prepared_folder)
    return folders


def test_one_teacher_trains_the_student_of_lesson_2(teachers, prepared_folder, tmp_path):
    flags = [*SIX, "--steps", 2, "--data", prepared_folder, "--teacher", teachers[0]]
    run(train_distillation, *flags, "--out", tmp_path / "lesson")
    for name, *more in (("mixture",), ("product", "--learn_weights", 2)):
        run(ensemble, *flags, "--combine", name, *more, "--out", tmp_path / name)
        assert same_bits(tmp_path / "lesson", tmp_path / name), "one teacher is lesson 2"


def test_resume_with_every_flag(teachers, prepared_folder, tmp_path, monkeypatch, capsys):
    both = ",".join(map(str, teachers))
    flags = ["--data", prepared_folder, "--teacher", both, "--learn_weights", 4, "--alpha", 0.3]
    flags += ["--most_disagreement", 0.3, "--temperature", 2, "--combine", "product"]
    flags += ["--steps", 3, "--batch_size", 8]  # the state that a killed run left is of step 2
    check_resume(ensemble, flags, tmp_path, monkeypatch, update=3)
    assert len(read_json(tmp_path / "whole" / "run.json")["sources"]["teacher_sha256"]) == 2
    assert all(float(J) > 0.01 for (J,) in logged(tmp_path / "whole", "disagreement")), (
        "teachers that never disagree are one teacher: a folder was dropped (as in verl)"
    )
    said = next(line for line in capsys.readouterr().out.splitlines() if line[:8] == "weights:")
    weights = [float(part.split()[-1]) for part in said.split(", ")]
    assert weights != [0.5, 0.5] and sum(weights) == pytest.approx(1, abs=2e-3)


def test_no_teacher_is_written_over(teachers, prepared_folder):
    both = ",".join(map(str, teachers))
    with pytest.raises(ValueError, match="would write where --teacher"):
        run(ensemble, "--data", prepared_folder, "--teacher", both, "--out", teachers[1])
