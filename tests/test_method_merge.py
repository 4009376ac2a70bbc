"""Merging: the weights and the average by hand, parts of the text that share no window, descendants
of one ancestor and of two."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset import PackedText
from dataset.parts import PartOfText
from files import read_json
from methods import merge as method
from methods.merge import compute_loss
from model import ModelConfig, Transformer, load_model
from model.merge import merge, merge_weights
from run.phases import share_of
from tests.explain import check
from tests.short_runs import SIX, check_resume, run, weights

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 12, 0]])


# Weights.


@pytest.mark.parametrize("losses, tau, expected", [
    ([1.0, 1.0 + np.log(2)], 1.0, [2 / 3, 1 / 3]),  # twice as likely, twice the weight
    ([1.0, 1.0 + np.log(2)], 0.5, [4 / 5, 1 / 5]),  # half the tau squares the ratio
    ([3.0, 3.0, 3.0], 0.1, [1 / 3] * 3),
    ([4.0, 3.9, 4.1], 1e-6, [0.0, 1.0, 0.0]),  # the best alone
    ([4.0, 3.9, 4.1], 1e6, [1 / 3] * 3),  # the plain mean
])  # fmt: skip
def test_weights_worked_by_hand(losses, tau, expected):
    found = merge_weights(losses, tau)
    assert found == pytest.approx(expected, abs=1e-6)
    assert sum(found) == pytest.approx(1) and merge_weights([x + 7 for x in losses], tau) == (
        pytest.approx(found)  # as all softmax
    )
    if len(set(losses)) > 1 and tau < 1e6:
        wrong = (torch.tensor(losses) / tau).softmax(0)  # without the minus the worst has most
        assert wrong.argmax() != np.argmax(found), "the mutant must be told apart"


# The average.


def random_model(seed=0):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(13, 12, 2, 2, 1, 6, 10, 32))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5 * torch.randn(weight.shape))
    return model


def test_average_worked_by_hand():
    states = [{"w": torch.tensor([1.0, 10.0])}, {"w": torch.tensor([3.0, -2.0])}]
    assert merge(states, [0.75, 0.25])["w"].tolist() == [1.5, 7.0]
    assert torch.equal(merge(states, [1.0, 0.0])["w"], states[0]["w"])
    state = random_model().state_dict()
    for name, x in merge([state] * 4, [0.25] * 4).items():
        assert torch.equal(x, state[name]), "the average of one model with itself is that model"


def test_it_is_in_float32_and_its_weights_add_up():
    """Two shipped defects: an average in bfloat16, and a check of sum(weights) - 1 <= 0.001, which
    lets through whatever adds up to less than 1, so that the model shrinks."""
    learned = torch.tensor([1.0, 1.0078125]).bfloat16()  # neighbours in bfloat16
    states = [{"w": learned[:1]}, {"w": learned[1:]}]
    assert merge(states, [0.5, 0.5])["w"].item() == 1.00390625
    mutant = 0.5 * learned[:1] + 0.5 * learned[1:]
    assert mutant.float().item() in (1.0, 1.0078125), "rounded to one of the two"
    assert sum([0.5, 0.25]) - 1 <= 1e-3, "the mutant sees no fault"
    with pytest.raises(AssertionError, match="shrink or grow"):
        merge(states, [0.5, 0.25])
    with pytest.raises(ValueError):
        merge(states, [0.5, 0.25, 0.25])


def test_models_of_two_ancestors_cannot_be_averaged_even_if_they_compute_the_same():
    """Toy evidence for the trap: a model and the same one with its hidden units in another order
    say the same to the last logit; their average says something else. A small step from one
    ancestor may be averaged."""
    model, other, child = random_model(), random_model(), random_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in other.model.layers:
            order, mlp = torch.randperm(10), layer.mlp
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
        for weight in child.parameters():
            weight.add_(0.01 * torch.randn(weight.shape))
    logits = model(IDS)
    torch.testing.assert_close(other(IDS), logits, rtol=1e-4, atol=1e-4)

    def distance(*models):
        merged = random_model(seed=9)
        merged.load_state_dict(merge([x.state_dict() for x in models], [0.5, 0.5]))
        return ((merged(IDS) - logits).norm() / logits.norm()).item()

    apart = ((child(IDS) - logits).norm() / logits.norm()).item()
    assert distance(model, child) < 0.8 * apart, (
        "halfway to a child should be nearer than the child"
    )
    assert distance(model, other) > 0.2, "averaging other orders should have ruined the model"


def test_loss():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, dtype=torch.float64), torch.randint(5, (2, 4))
    labels[0, 2:] = -100
    logits[0, 3] = torch.nan
    loss, parts = compute_loss(logits, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    check(loss, expected, {"the mean is over all tokens": expected * 6 / 8})
    assert parts["ce"] is loss


# Parts of the text.


def part_args(data, **changes):
    flags = {"seq_len": 32, "data_share": 0.5, "parts": 3, "examples": 5}
    return Namespace(data=str(data), **{**flags, **changes})


def test_parts_share_no_window(prepared_folder):
    args = part_args(prepared_folder)
    whole = PackedText(prepared_folder, "train", 32, 0.5)
    texts = {which: PartOfText(args, which) for which in ("examples", "all", 0, 1, 2)}
    windows = {which: text.windows.tolist() for which, text in texts.items()}
    assert windows[0] + windows[1] + windows[2] == windows["all"], "one after another in the text"
    assert sorted(windows["all"] + windows["examples"]) == list(range(whole.size))
    assert len(windows["examples"]) == 5 and windows["examples"][-1] == whole.size - 1
    sizes = [len(windows[i]) for i in range(3)]
    assert max(sizes) - min(sizes) <= 1
    for which, text in texts.items():
        steps = len(windows[which]) // 2
        batches = [text.batch(step, 2, seed=0) for step in range(steps)]
        rows = {tuple(row.tolist()) for input_ids, _ in batches for row in input_ids}
        allowed = {tuple(row.tolist()) for row in whole.take(np.array(windows[which]))[0]}
        assert rows <= allowed and len(rows) == 2 * steps, f"{which}: an epoch of other windows"
        held_out = text.held_out.evaluation(4, 8)
        expected = whole.held_out.evaluation(4, 8)
        for (a, _), (b, _) in zip(held_out, expected, strict=True):
            assert torch.equal(a, b), "held out is the same text for all"


def test_too_few_windows_are_refused(prepared_folder):
    with pytest.raises(ValueError, match="too few for 500 examples and 3 parts: ask for fewer"):
        PartOfText(part_args(prepared_folder, examples=500), "all")


# Runs.


def test_a_share_of_a_budget():
    args = Namespace(steps=200, flops=None, seconds=None)
    assert share_of(args, 0.5 / 3) == {"steps": 33}
    assert share_of(Namespace(steps=1, flops=None, seconds=90.0), 0.25) == {
        "steps": 1,
        "seconds": 22.5,
    }
    assert share_of(Namespace(steps=8, flops=1e9, seconds=None), 0.5) == {"steps": 4, "flops": 5e8}


def close(first, second, within) -> bool:
    one, two = weights(first), weights(second)
    return all((one[name] - two[name]).abs().max() <= within for name in one)


def test_stop_and_resume(prepared_folder, tmp_path, monkeypatch):
    """Killed in the first part; then what came out is held against its parts."""
    flags = ["--data", prepared_folder, "--examples", 7, "--parts", 2, "--base_share", 0.33]
    record = check_resume(method, flags, tmp_path, monkeypatch, update=4)
    out = tmp_path / "whole"
    names = ["base0", "part0", "part1"]
    assert list(record["phases"]) == [*names, "last"]
    assert record["tokens"] == (2 + 2 + 2 + 1) * 4 * 32, "steps of base, parts and last run"
    states = [weights(out / "phases" / name) for name in names[1:]]
    found = read_json(out / "merge.json")
    parts = [read_json(out / "phases" / name / "run.json") for name in names[1:]]
    assert found["val_losses"] == [part["metrics"]["val_loss"] for part in parts]
    assert all(part["args"]["student"].endswith("phases/base0") for part in parts)
    few = PartOfText(part_args(prepared_folder, data_share=1.0, examples=7, parts=2), "examples")
    input_ids, labels = few.take(np.arange(7))
    for folder, loss in zip(names[1:], found["example_losses"], strict=True):
        logits = load_model(out / "phases" / folder)(input_ids)
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        assert loss == pytest.approx(expected, rel=1e-5), "L is the loss on the examples"
    shares = np.exp(-np.array(found["example_losses"]) / 0.1)
    shares = shares / shares.sum()
    assert found["weights"] == pytest.approx(shares.tolist())
    for name, x in weights(out).items():
        expected = sum(w * state[name].double() for w, state in zip(shares, states, strict=True))
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-7)
    assert close(out, out / "phases" / "merged", 1e-9), "the last step moves nothing"
    assert not close(out, out / "phases" / "part0", 1e-6)


def test_two_ancestors_and_the_limit_of_one_part(prepared_folder, tmp_path):
    """tau near 0: the best part comes out as it is. Parts come from bases of two seeds in turn."""
    flags = ["--data", prepared_folder, *SIX, "--ancestors", 2, "--tau", 1e-6, "--parts", 2]
    run(method, *flags, "--base_share", 0.7, "--data_share", 0.9, "--out", tmp_path)
    found = read_json(tmp_path / "merge.json")
    best = int(np.argmin(found["example_losses"]))
    assert close(tmp_path, tmp_path / "phases" / f"part{best}", 1e-9)
    phases = [read_json(tmp_path / "phases" / f"{x}{i}" / "run.json")["args"]
              for x in ("base", "part") for i in (0, 1)]  # fmt: skip
    assert [phase["seed"] for phase in phases] == [0, 1, 0, 0]
    assert [phase["part"] for phase in phases] == ["all", "all", 0, 1]
    assert [phase["steps"] for phase in phases] == [2, 2, 1, 1]
    assert [phase["student"].split("/")[-1] for phase in phases[2:]] == ["base0", "base1"]
