"""Shapes of one size and the rankings of them (methods/shape_search.py)."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from files import read_json
from methods import shape_search
from methods.shape_search import compute_loss
from model import PRESETS, ModelConfig, Transformer, save_model
from model.shapes import kendall_tau, shapes_of_size
from tests.short_runs import check_resume


def test_tau_by_hand():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    # Of 6 pairs of 4, one is in opposite orders: (5 - 1) / 6
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # A tie is neither: (2 - 0) / 3, where a count of "not in the same order" would give 1/3.
    assert kendall_tau([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / 3)


def swaps(order) -> int:
    """Neighbours that bubble sort swaps: the pairs in the wrong order, counted another way."""
    order, count = list(order), 0
    for end in range(len(order) - 1, 0, -1):
        for i in range(end):
            if order[i] > order[i + 1]:
                order[i], order[i + 1], count = order[i + 1], order[i], count + 1
    return count


def test_tau_is_that_of_all_permutations():
    """tau = 1 - 4 swaps / (n (n - 1)); over all orders its mean is 0 and its variance
    2 (2n + 5) / (9n (n - 1)), as the docstring says."""
    n, values = 6, []
    for order in itertools.permutations(range(n)):
        values.append(kendall_tau(list(range(n)), order))
        assert values[-1] == pytest.approx(1 - 4 * swaps(order) / (n * (n - 1)))
    assert sum(values) == pytest.approx(0, abs=1e-9)
    variance = sum(value**2 for value in values) / len(values)
    assert variance == pytest.approx(2 * (2 * n + 5) / (9 * n * (n - 1)))
    assert (2 * 29 / (9 * 12 * 11)) ** 0.5 == pytest.approx(0.22, abs=0.005)


def test_tau_looks_at_order_alone_and_is_symmetric():
    rng = random.Random(0)
    for _ in range(20):
        first, second = ([rng.random() for _ in range(9)] for _ in range(2))
        tau = kendall_tau(first, second)
        assert tau == kendall_tau(second, first)
        assert tau == kendall_tau([x**3 for x in first], second)
        assert tau == -kendall_tau([-x for x in first], second)


@pytest.mark.parametrize("preset, V", [("nano", 2048), ("micro", 400)])
def test_shapes_are_of_one_size(preset, V, monkeypatch):
    like = ModelConfig.preset(preset, V)
    size, found = Transformer(like).num_parameters(), shapes_of_size(12, like)
    monkeypatch.setitem(PRESETS, "none", ())  # what is added is taken out again
    assert len(found) == len(set(found.values())) == 12
    for name, shape in found.items():
        monkeypatch.setitem(PRESETS, name, shape)
        model = Transformer(ModelConfig.preset(name, V))
        assert abs(model.num_parameters() / size - 1) < 0.02, f"{name} is of another size"
        assert name == f"d{model.config.hidden_size}-l{model.config.num_hidden_layers}"
    ratios = [shape[1] / shape[0] for shape in found.values()]
    assert ratios == sorted(ratios) and ratios[-1] > 10 * ratios[0], "all nearly one shape"


def test_more_shapes_than_there_are():
    with pytest.raises(ValueError, match="--shapes 50: only .* of this size, lower it"):
        shapes_of_size(50, ModelConfig.preset("nano", 2048))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_lesson_2(alpha):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[0, 3:] = -100
    valid = labels != -100
    log_q, p = student.log_softmax(-1)[valid], teacher.softmax(-1)[valid]
    kl = F.kl_div(log_q, p, reduction="batchmean")
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    loss, parts = compute_loss(student, None if alpha == 1 else teacher, labels, alpha)
    assert loss.item() == pytest.approx((alpha * ce + (1 - alpha) * kl).item(), rel=1e-12)
    assert ("kl" in parts) == (alpha < 1)


def test_a_search_stops_and_resumes_to_the_same_bits(prepared_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("model.shapes.MOST_LAYERS", 3)
    for name in shapes_of_size(2, ModelConfig.preset("nano", 400)):
        monkeypatch.setitem(PRESETS, name, PRESETS["nano"])  # taken out again after the test
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    save_model(Transformer(ModelConfig(400, 32, 2, 2, 1, 16, 64)), teacher, prepared_folder)
    flags = ["--data", prepared_folder, "--teacher", teacher, "--shapes", 2, "--short", 1]
    # Two short runs of each shape, one update each; the eighth is in the middle of a last run.
    record = check_resume(shape_search, [*flags, "--steps", 4], tmp_path, monkeypatch, update=7)
    table = read_json(tmp_path / "whole" / "shapes.json")
    assert table == read_json(tmp_path / "killed" / "shapes.json")
    shapes, chosen = table["shapes"], table["chosen"]
    assert chosen == min(shapes, key=lambda name: shapes[name]["teacher"])
    assert record["args"]["student"] == chosen
    assert record["metrics"]["val_loss"] == shapes[chosen]["last"]
    assert record["tokens"] == 2 * (1 + 1 + 4) * 4 * 32, "every run is charged"
    [one, two] = shapes.values()
    for key, tau in table["tau"].items():
        assert tau == (1 if (one[key] - two[key]) * (one["last"] - two["last"]) > 0 else -1)
    text = next(phase for name, phase in record["phases"].items() if name.endswith("-text"))
    heard = next(phase for name, phase in record["phases"].items() if name.endswith("-teacher"))
    assert heard["flops"] > text["flops"], "the teacher's passes are not charged"


@pytest.mark.parametrize("flags, said", [
    (["--shapes", 1], "--shapes 1 must be between 2 and 50"),
    (["--short", 0], "--short 0 must be between 1 and"),
])  # fmt: skip
def test_ranges(flags, said, prepared_folder, tmp_path):
    args = shape_search.parse_args([str(x) for x in (*flags, "--out", tmp_path / "run")])
    with pytest.raises(ValueError, match=said):
        shape_search.main(args)
