"""Experts to dense: the loss against values by hand and torch's, the teacher's phase, starts."""

import math

import pytest
import torch
import torch.nn.functional as F

from methods import experts_to_dense
from methods.experts_to_dense import compute_loss
from model import ExpertsConfig, read_config
from tests.explain import check
from tests.short_runs import SIX, check_resume, logged, run, weights

LN = math.log
PHASE = ["--teacher_steps", 3, "--experts", 3]


def logits_of(*probabilities):
    """(1, 1, V) logits whose softmax is `probabilities`, shifted."""
    return torch.tensor([[[LN(p) for p in probabilities]]], dtype=torch.float64) + 3.0


def random_case(B=2, S=4, V=5):
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(B, S, V, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(V, (B, S))
    labels[0, 2:] = -100
    return student, teacher, labels


# The loss.


@pytest.mark.parametrize("alpha, expected", [
    (0.0, 0.75 * LN(1.5) + 0.25 * LN(0.5)),  # 3/4 ln(3/4 : 1/2) + 1/4 ln(1/4 : 1/2)
    (1.0, LN(2)),  # the label has probability 1/2
    (0.25, 0.25 * LN(2) + 0.75 * (0.75 * LN(1.5) + 0.25 * LN(0.5))),
])  # fmt: skip
def test_values_worked_by_hand(alpha, expected):
    student, teacher, label = logits_of(0.5, 0.5), logits_of(0.75, 0.25), torch.tensor([[1]])
    kl, swapped = 0.75 * LN(1.5) + 0.25 * LN(0.5), 0.5 * LN(2 / 3) + 0.5 * LN(2)
    loss, parts = compute_loss(student, teacher, label, alpha)
    check(loss, expected, {
        "KL(student || teacher): the two are swapped": alpha * LN(2) + (1 - alpha) * swapped,
        "alpha stands on the KL": (1 - alpha) * LN(2) + alpha * kl,
        "the mean is over the vocabulary": alpha * LN(2) + (1 - alpha) * kl / 2,
    })  # fmt: skip
    assert parts["ce"].item() == pytest.approx(LN(2)) and parts["kl"].item() == pytest.approx(kl)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_it_equals_torch_in_float64(alpha):
    student, teacher, labels = random_case()
    valid = labels != -100
    kl = F.kl_div(student.log_softmax(-1)[valid], teacher.softmax(-1)[valid], reduction="sum")
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    loss, _ = compute_loss(student, teacher, labels, alpha)
    check(loss, float(alpha * ce + (1 - alpha) * kl / valid.sum()), {}, rel=1e-10)


def test_gradients():
    student, teacher, labels = random_case()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    torch.autograd.gradcheck(lambda x: compute_loss(x, teacher, labels, 0.3)[0], (student,))
    loss, _ = compute_loss(student, teacher, labels, 0.0)
    found, of_teacher = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert of_teacher is None, "a gradient reaches the teacher"
    expected = (student.softmax(-1) - teacher.softmax(-1)) * (labels != -100)[..., None] / 6
    torch.testing.assert_close(found, expected.detach())  # q - p over the valid tokens


def test_limits_masks_and_tokens_ruled_out():
    student, teacher, labels = random_case()
    assert compute_loss(teacher, teacher, labels, 0.0)[0].abs() < 1e-12, "q = p must give 0"
    before = compute_loss(student, teacher, labels, 0.3)[0]
    student[0, 2], teacher[0, 3] = torch.nan, torch.inf  # where labels are -100
    assert compute_loss(student, teacher, labels, 0.3)[0] == before, "a masked token leaks"
    teacher[1, :, 0] = -torch.inf
    probs = teacher[1].softmax(-1)
    assert compute_loss(student, teacher, labels, 0.0)[0].isfinite(), "0 log 0 is 0"
    assert torch.isnan(probs * (probs.log() - student[1].log_softmax(-1))).any(), "not by itself"


def test_micro_batches_give_the_same():
    student, teacher, labels = random_case()
    whole = compute_loss(student, teacher, labels, 0.3)[0]
    pieces = [(compute_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], 0.3)[0], n)
              for i, n in ((0, 2), (1, 4))]  # fmt: skip
    check(sum(loss * n for loss, n in pieces) / 6, whole.item(), {
        "micro-batches count alike, not by their tokens": sum(loss for loss, _ in pieces).item() / 2
    })  # fmt: skip


# Runs.


@pytest.fixture(scope="module")
def chain(prepared_folder, tmp_path_factory):
    """A run that trained its own teacher: the folder of that."""
    out = tmp_path_factory.mktemp("experts") / "chain"
    flags = ["--data", prepared_folder, *SIX, *PHASE, "--alpha", 0.7]
    record = run(experts_to_dense, *flags, "--out", out)
    return out, record


def test_the_teacher_of_a_phase_is_a_mixtral_folder(chain):
    out, record = chain
    config = read_config(out / "phases" / "teacher")
    assert isinstance(config, ExpertsConfig)
    assert (config.num_local_experts, config.num_experts_per_tok) == (3, 2)
    assert config.router_aux_loss_coef == 0.02
    assert not isinstance(read_config(out), ExpertsConfig), "the student is dense"
    assert record["phases"].keys() == {"teacher", "last"}
    assert record["tokens"] == (3 + 6) * 4 * 32
    assert record["metrics"]["kl"] >= 0 and record["metrics"]["teacher_loss"] > 0


def test_alpha_does_not_scale_the_balance_loss(chain):
    """MiniMind adds it to a CE that alpha multiplies; here it is only in the teacher's phase."""
    log = logged(chain[0] / "phases" / "teacher", "ce", "balance", "train_loss")
    for ce, balance, loss in [[float(x) for x in row] for row in log]:
        assert loss == pytest.approx(ce + 0.02 * balance, rel=1e-4), "the balance is not weighed"
        assert 2 <= balance < 3, "of 3 experts, 2 a token: 2 if even, 3 if two have all"
        assert loss != pytest.approx(ce + 0.7 * 0.02 * balance, rel=1e-4), "the mutant is not seen"
    for ce, kl, loss in [
        [float(x) for x in row] for row in logged(chain[0], "ce", "kl", "train_loss")
    ]:
        assert loss == pytest.approx(0.7 * ce + 0.3 * kl, rel=1e-4), "a student has CE and KL alone"


def test_every_expert_and_gate_has_learned(chain, prepared_folder, tmp_path):
    """None is left out of the optimizer: a run at no rate keeps the first weights, to compare."""
    flags = ["--data", prepared_folder, *SIX, *PHASE, "--steps", 1, "--learning_rate", 1e-12]
    run(experts_to_dense, *flags, "--start", "random", "--out", tmp_path)
    first, last = (weights(out / "phases" / "teacher") for out in (tmp_path, chain[0]))
    experts = [name for name in last if "block_sparse_moe" in name]
    assert len(experts) == 2 * (1 + 3 * 3)
    for name in experts:
        assert (first[name] - last[name]).abs().max() > 1e-3, f"{name} has not learned"


@pytest.mark.parametrize("start", ["one", "average"])
def test_a_start_is_in_the_first_weights(start, chain, prepared_folder, tmp_path):
    """One step at a tiny rate leaves what `start_dense` made: teacher's attention, some SwiGLU."""
    teacher = chain[0] / "phases" / "teacher"
    flags = ["--data", prepared_folder, "--teacher", teacher, *SIX, "--start", start]
    flags += ["--steps", 1, "--learning_rate", 1e-9]
    record = run(experts_to_dense, *flags, "--out", tmp_path)
    assert "phases" not in record, "a teacher that is given costs no training"
    mine, theirs = weights(tmp_path), weights(teacher)
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)
    ups = [theirs[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"] for e in range(3)]
    up = mine["model.layers.1.mlp.up_proj.weight"]
    distances = [(up - x).abs().max() for x in ups]
    assert (min(distances) < 1e-6) == (start == "one")


def test_stop_and_resume(prepared_folder, tmp_path, monkeypatch):
    """Killed in the phase: a sparse model with its optimizer comes back to the bit."""
    flags = ["--data", prepared_folder, *PHASE, "--experts_per_token", 1, "--balance", 0.1]
    flags += ["--start", "rest"]
    check_resume(experts_to_dense, flags, tmp_path, monkeypatch, update=3)
    teachers = [weights(tmp_path / name / "phases" / "teacher") for name in ("whole", "killed")]
    assert all(torch.equal(teachers[0][name], teachers[1][name]) for name in teachers[0])


def test_what_cannot_be_is_refused(prepared_folder, chain, tmp_path):
    flags = ["--data", prepared_folder, *SIX, "--out", tmp_path / "new"]
    with pytest.raises(ValueError, match="teacher has no experts to start from: pass a folder of"):
        run(experts_to_dense, *flags, "--teacher", chain[0])
    sparse = chain[0] / "phases" / "teacher"
    with pytest.raises(ValueError, match="hidden_size is 96 in the student and 64 in the teacher"):
        run(experts_to_dense, *flags, "--teacher", sparse, "--student", "micro")
    with pytest.raises(ValueError, match="4 experts per token of 3: use fewer"):
        run(experts_to_dense, *flags, *PHASE, "--experts_per_token", 4)
    with pytest.raises(ValueError, match="leave --fsdp, --teacher_dtype"):
        run(experts_to_dense, *flags, "--fsdp")
