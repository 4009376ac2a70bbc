"""Layer by layer (methods/progressive_layers.py), and all layers with moving weights
(methods/dynamic_layers.py): the losses by hand, what must stay frozen, what limits are plain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_distillation
from dataset import PackedText
from distill.hidden import layer_errors
from methods import dynamic_layers, progressive_layers
from methods.dynamic_layers import changes, lag
from model import ModelConfig, Record, Transformer, load_model, save_model
from model.freeze import freeze_but
from tests.short_runs import SIX, check_resume, nearly_equal, run, weights


def states_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def same(x):
    return x


# Layer by layer.


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "teacher"
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig(400, 32, 4, 2, 1, 16, 64)), folder, prepared_folder)
    return folder


def freeze_blocks(student, number):
    """What is often written: the earlier blocks are frozen, and the tied embedding is forgotten."""
    for layer in student.model.layers[: number - 1]:
        layer.requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_frozen_gets_a_gradient_not_even_by_the_head(tied):
    config = ModelConfig(50, 8, 3, 2, 1, 4, 12, tie_word_embeddings=tied)
    student, input_ids = Transformer(config), torch.arange(12).view(2, 6)
    learn = {}
    for number in (1, 2, 3):
        freeze_but(student, number)
        F.cross_entropy(student(input_ids).flatten(0, 1), input_ids.flatten()).backward()
        learn[number] = {name for name, p in student.named_parameters() if p.grad is not None}
        student.zero_grad(set_to_none=True)
    for number, names in learn.items():
        of_layer = {name for name in names if name.startswith(f"model.layers.{number - 1}.")}
        embedding = {"model.embed_tokens.weight"} if number == 1 else set()
        assert of_layer and names == of_layer | embedding, f"phase {number} moves {names}"
    mutant = Transformer(config)
    freeze_blocks(mutant, 2)
    F.cross_entropy(mutant(input_ids).flatten(0, 1), input_ids.flatten()).backward()
    assert mutant.lm_head.weight.grad is not None
    assert mutant.model.embed_tokens.weight.grad is not None, "the mutant is not told apart"


SHARE = ["--share", 0.67]  # of 6 steps: 2 for each of two layers, 2 for all


def test_layer_by_layer_stops_and_resumes_to_the_same_bits(
    prepared_folder, teacher, tmp_path, monkeypatch
):
    """And in the same run: phases, what they move, what they are taught, what they cost."""
    targets, loss = [], progressive_layers.hidden_state_loss
    monkeypatch.setattr(
        progressive_layers, "hidden_state_loss",
        lambda state, target, *more: (targets.append(target), loss(state, target, *more))[1],
    )  # fmt: skip
    flags = ["--data", prepared_folder, "--teacher", teacher, *SHARE, "--weight_decay", 0.5]
    # The fourth update is the second one of layer 2: layer 1 is finished, layer 2 starts again.
    record = check_resume(progressive_layers, flags, tmp_path, monkeypatch, update=4)
    whole = tmp_path / "whole"
    first, second = (weights(whole / "phases" / name) for name in ("layer1", "layer2"))
    last = weights(whole)
    for name in first:
        frozen = not name.startswith("model.layers.1.")
        assert torch.equal(first[name], second[name]) == frozen, f"{name} in layer 2's phase"
        assert not torch.equal(second[name], last[name]), f"{name} did not learn in the last phase"
    assert (first["model.layers.1.input_layernorm.weight"] == 1).all(), "layer 2 learned too soon"
    assert not (first["model.layers.0.input_layernorm.weight"] == 1).all()

    text, record_of = PackedText(prepared_folder, "train", 32), Record("hidden")
    load_model(teacher)(text.batch(0, 4, 0)[0], record=record_of)
    for found, layer in zip(targets[0:4:2], (2, 4), strict=True):  # of 4; index 0: the embedding
        torch.testing.assert_close(found, record_of.hidden[layer])

    assert list(record["phases"]) == ["layer1", "layer2", "last"]
    assert record["tokens"] == 6 * 4 * 32, "all phases together take the tokens of one run"
    costs = [record["phases"][name]["flops"] for name in ("layer1", "layer2", "last")]
    assert record["flops"] == sum(costs) and max(costs[:2]) < costs[2]


def test_without_a_share_it_is_lesson_2(prepared_folder, teacher, tmp_path):
    flags = [*SIX, "--steps", 2, "--data", prepared_folder, "--teacher", teacher, "--alpha", 0.3]
    run(progressive_layers, *flags, "--share", 0, "--out", tmp_path / "layers")
    run(train_distillation, *flags, "--out", tmp_path / "lesson")
    assert nearly_equal(tmp_path / "layers", tmp_path / "lesson")


@pytest.mark.parametrize("flags, said", [
    (["--steps", 2], "--steps 2 are too few for 2 layers and a last phase"),
    (["--flops", 1e12], "leave --flops"),
    (["--share", 0.96], "--share 0.96 must be between 0 and 0.95"),
])  # fmt: skip
def test_what_cannot_be_shared_out(flags, said, prepared_folder, teacher, tmp_path):
    flags = ["--data", prepared_folder, "--teacher", teacher, *flags, "--out", tmp_path / "run"]
    with pytest.raises(ValueError, match=said):
        run(progressive_layers, *flags)
    assert not (tmp_path / "run").exists()


# Weights that follow the layers that lag.


@pytest.mark.parametrize(
    "errors, power, expected",
    [
        ((1.0, 3.0), 1.0, (1 / 4, 3 / 4)),
        ((1.0, 3.0), 2.0, (1 / 10, 9 / 10)),
        ((1.0, 3.0, 7.0), 0.0, (1 / 3, 1 / 3, 1 / 3)),
        ((2.0, 2.0), 3.0, (1 / 2, 1 / 2)),
        ((0.0, 0.0), 1.0, (1 / 2, 1 / 2)),  # nobody lags: not 0 / 0
    ],
)
def test_weights_of_layers_by_hand(errors, power, expected):
    found = lag(torch.tensor(errors, dtype=torch.float64), power)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_lag_that_carries_gradient_pays_a_layer_for_falling_behind():
    """e = (1, 3), power 1. By e / sum e as constants the gradient is (1/4, 3/4). Through them it is
    that of (e1^2 + e2^2) / (e1 + e2): (2 * 1 * 4 - 10) / 16 = -1/8 and (2 * 3 * 4 - 10) / 16."""
    e = torch.tensor([1.0, 3.0], requires_grad=True)
    (lag(e, 1.0) * e).sum().backward()
    assert e.grad.tolist() == [0.25, 0.75], "gradient flows through the weights of the layers"
    other = torch.tensor([1.0, 3.0], requires_grad=True)
    (other / other.sum() * other).sum().backward()
    assert other.grad.tolist() == [-0.125, 0.875]  # the mutant: the better layer is to get worse


def test_weights_that_do_not_sum_to_one_change_the_rate():
    e = torch.tensor([0.3, 0.9, 0.3])
    assert (lag(e, 2.0) * e).sum() <= e.max() and (lag(e, 2.0) * e).sum() >= e.mean()
    assert (e**2 * e).sum() > 0.78 and (e**2).sum() < 1, "the mutant is not told apart"


def case(layers=3, seed=0):
    """Records of a student of width 4 and a teacher of width 6, W and U, and labels (2, 5)."""
    mine, theirs = Record("hidden"), Record("hidden")
    mine.logits, theirs.logits = states_of(2, 5, 7, seed=seed), states_of(2, 5, 7, seed=seed + 1)
    mine.hidden = list(states_of(layers + 1, 2, 5, 4, seed=seed + 2))
    theirs.hidden = list(states_of(layers + 1, 2, 5, 6, seed=seed + 3))
    torch.manual_seed(seed)
    maps = [[nn.Linear(4, 6, bias=False).double() for _ in range(layers)] for _ in "WU"]
    labels = torch.randint(7, (2, 5))
    labels[0, 3:] = -100
    return mine, theirs, labels, maps


def by_torch(states, targets, maps, valid):
    """An independent form: F.rms_norm and F.mse_loss of the tokens that count."""
    norm = [lambda x, n=n: F.rms_norm(x, (n,), eps=1e-12) for n in (4, 6)]
    return torch.stack([
        F.mse_loss(project(norm[0](h))[valid], norm[1](t)[valid])
        for h, t, project in zip(states, targets, maps, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_whole_loss(power):
    mine, theirs, labels, (W, U) = case()
    loss, parts = dynamic_layers.compute_loss(mine, theirs, labels, (W, U), 0.3, 0.7, 1.9, power)
    valid = labels != -100
    e = by_torch(mine.hidden[1:], theirs.hidden[1:], W, valid)
    steps = [[r.hidden[n + 1] - r.hidden[n] for n in range(3)] for r in (mine, theirs)]
    d = by_torch(*steps, U, valid)
    ce = F.cross_entropy(mine.logits.flatten(0, 1), labels.flatten())
    log_q, p = mine.logits.log_softmax(-1)[valid], theirs.logits.softmax(-1)[valid]
    kl = F.kl_div(log_q, p, reduction="batchmean")
    layers = sum(w * (x**power * x).sum() / (x**power).sum() for w, x in ((0.7, e), (1.9, d)))
    assert loss.item() == pytest.approx((0.3 * ce + 0.7 * kl + layers).item(), rel=1e-9)
    expected = {"ce": ce, "kl": kl, "hidden": e.mean(), "changes": d.mean()}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-9), name


def test_gradients_by_finite_differences():
    mine, theirs, labels, maps = case(layers=2)

    def loss(*hidden):
        record = copy.copy(mine)
        record.hidden = list(hidden)  # power 0: the weights are constants, as stop() makes them
        return dynamic_layers.compute_loss(record, theirs, labels, maps, 0.5, 0.7, 1.9, 0.0)[0]

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in mine.hidden])
    for record in (mine, theirs):
        record.hidden = [x.detach().requires_grad_() for x in record.hidden]
    loss(*mine.hidden).backward()
    assert all(x.grad is None for x in theirs.hidden), "the teacher would learn"
    assert all(x.grad.any() for x in mine.hidden)
    assert all(project.weight.grad.any() for some in maps for project in some)


def test_changes_do_not_see_what_all_layers_share():
    """A constant added to every state moves the states, not their changes; and a state too many or
    too few would be another layer's."""
    mine, theirs, labels, (W, U) = case()
    valid, moved = labels != -100, [x + 2.0 for x in mine.hidden]
    before = layer_errors(changes(mine.hidden), changes(theirs.hidden), U, valid)
    after = layer_errors(changes(moved), changes(theirs.hidden), U, valid)
    torch.testing.assert_close(before, after)
    states = (layer_errors(x[1:], theirs.hidden[1:], W, valid) for x in (mine.hidden, moved))
    assert not torch.allclose(*states)
    with pytest.raises(ValueError):
        layer_errors(mine.hidden, theirs.hidden[1:], W, valid)


def test_states_that_agree_cost_nothing():
    _, theirs, labels, _ = case()
    I = [[same] * 3] * 2  # noqa: E741
    loss, _ = dynamic_layers.compute_loss(theirs, theirs, labels, I, 0.0, 1.0, 1.0, 1.0)
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_uniform_weights_do_not_care_for_micro_batches_and_others_do():
    mine, theirs, labels, maps = case()

    def loss_of(rows, power):
        parts = []
        for record in (mine, theirs):
            part = Record("hidden")
            part.logits, part.hidden = record.logits[rows], [x[rows] for x in record.hidden]
            parts.append(part)
        return dynamic_layers.compute_loss(*parts, labels[rows], maps, 0.3, 0.7, 1.9, power)[0]

    def cut(power):
        return (3 * loss_of(slice(0, 1), power) + 5 * loss_of(slice(1, 2), power)) / 8

    assert cut(0.0).item() == pytest.approx(loss_of(slice(None), 0.0).item(), rel=1e-12)
    assert cut(2.0).item() != pytest.approx(loss_of(slice(None), 2.0).item(), rel=1e-6)


def test_dynamic_layers_stop_and_resume_to_the_same_bits(
    prepared_folder, teacher, tmp_path, monkeypatch
):
    met, loss = [], dynamic_layers.compute_loss

    def spy(mine, theirs, *more):
        met.append((mine, theirs))
        return loss(mine, theirs, *more)

    monkeypatch.setattr(dynamic_layers, "compute_loss", spy)
    flags = ["--data", prepared_folder, "--teacher", teacher, "--weight", 0.3]
    flags += ["--dynamics", 0.2, "--power", 2, "--alpha", 0]
    check_resume(dynamic_layers, flags, tmp_path, monkeypatch)
    mine, theirs = met[0]
    record = Record("hidden")
    text = PackedText(prepared_folder, "train", 32)
    load_model(teacher)(text.batch(0, 4, 0)[0], record=record)
    assert len(mine.hidden) == len(theirs.hidden) == 3
    for found, layer in zip(theirs.hidden, (0, 2, 4), strict=True):
        torch.testing.assert_close(found, record.hidden[layer])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_without_weights_the_loss_is_that_of_lesson_2(alpha):
    mine, theirs, labels, maps = case()
    found, _ = dynamic_layers.compute_loss(mine, theirs, labels, maps, alpha, 0.0, 0.0, 1.0)
    lesson, _ = train_distillation.compute_loss(mine.logits, theirs.logits, labels, 1.0, alpha)
    last, _ = progressive_layers.compute_loss(mine.logits, theirs.logits, labels, alpha)
    assert found.item() == pytest.approx(lesson.item(), rel=1e-12)
    assert last.item() == pytest.approx(lesson.item(), rel=1e-12)


def test_a_negative_power_is_refused(prepared_folder, teacher, tmp_path):
    flags = ["--data", prepared_folder, "--teacher", teacher, "--out", tmp_path / "run"]
    with pytest.raises(ValueError, match="--power -1.0 must be between 0 and 16"):
        run(dynamic_layers, *flags, "--power", -1)
