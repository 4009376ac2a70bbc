"""What a run costs: operations counted by hand, budgets of operations and seconds, and that
counting changes nothing."""

import argparse
import csv

import pytest
import torch

import train_distillation
import train_pretrain
from files import read_json
from model import ModelConfig, Transformer, generate
from run import meter
from run.meter import CountFlops, Meter
from tests.short_runs import SMALL, argv_of, make_teacher, run, weights

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, intermediate_size=12, max_position_embeddings=32,
)  # fmt: skip


def products_by_hand(B, S):
    """Operations of the matrices and of attention in one forward pass: two per multiply-add."""
    D, H, K, d, F, V, L = 8, 4, 2, 6, 12, 11, 2
    layer = D * H * d + 2 * D * K * d + H * d * D + 3 * D * F  # q, k and v, o, gate, up and down
    matrices = 2 * B * S * (L * layer + D * V)
    attention = L * 2 * (2 * B * H * S * S * d)  # queries with keys, maps with values
    return matrices, attention


def test_a_forward_and_backward_pass_by_hand():
    """Backward has two products for each of forward's; attention five: it makes the maps again."""
    model, ids = Transformer(CONFIG), torch.randint(0, 11, (3, 5))
    matrices, attention = products_by_hand(3, 5)
    with CountFlops() as counter:
        logits = model(ids)
    assert counter.flops == matrices + attention
    with CountFlops() as counter:
        logits.sum().backward()
    assert counter.flops == 2 * matrices + 5 * attention / 2


def test_the_formula_of_attention_is_that_of_its_products():
    """Written out as two products, which torch counts itself, it is the same forward pass."""
    from model import Record

    model, ids = Transformer(CONFIG), torch.randint(0, 11, (3, 5))
    counts = []
    for record in (None, Record("attention")):
        with CountFlops() as counter, torch.no_grad():
            model(ids, record=record)
        counts.append(counter.flops)
    assert counts[0] == counts[1]


def test_generation_is_counted():
    """In inference mode, where a layer arrives as one operation. 3 tokens are read, then 2."""
    model = Transformer(CONFIG)
    with CountFlops() as counter:
        generate(model, [[1, 2, 3]], 3, stop_ids=())
    matrices, attention = products_by_hand(1, 3)
    head = 2 * 8 * 11
    expected = matrices - 2 * head + attention  # only the last position goes through the head
    for keys in (4, 5):
        expected += products_by_hand(1, 1)[0] + 2 * 2 * (2 * 4 * keys * 6)
    assert counter.flops == expected


def test_counting_changes_no_bit():
    torch.manual_seed(0)
    model, ids = Transformer(CONFIG), torch.randint(0, 11, (3, 5))
    gradients = []
    for counted in (False, True):
        model.zero_grad()
        if counted:
            with CountFlops():
                model(ids).log_softmax(-1)[..., 0].mean().backward()
        else:
            model(ids).log_softmax(-1)[..., 0].mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def flags(**values):
    given = {"steps": 1000, "flops": None, "seconds": None, "compile": False}
    return argparse.Namespace(**{**given, **values})


def test_work_of_one_kind_is_counted_four_times_and_then_estimated(monkeypatch):
    monkeypatch.setattr(meter, "EVERY", 5)
    counted, gauge = [], Meter(flags())
    enter = CountFlops.__enter__
    monkeypatch.setattr(CountFlops, "__enter__", lambda self: counted.append(1) or enter(self))
    a = torch.ones(4, 4)
    for _ in range(7):
        with gauge.count("products", 10):
            a @ a
    assert len(counted) == 5  # the first four, and the sixth
    gauge.end_step(1, 40)
    assert gauge.flops == 7 * 2 * 4**3 and gauge.tokens == 40


# Budgets.


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("meter"), prepared_folder)


def without(words, *names):
    """The flags without some that take a value."""
    words = [str(word) for word in words]
    for name in names:
        place = words.index(name)
        words = words[:place] + words[place + 2 :]
    return words


@pytest.mark.parametrize("name", ["pretrain", "distill"])
def test_a_budget_of_operations(name, prepared_folder, teacher, tmp_path):
    """As many steps as --flops pay for; the schedule is that of these steps, so the student too."""
    script, *words = argv_of(name, prepared_folder, teacher)
    whole = run(script, *words, "--out", tmp_path / "steps")
    assert whole["flops"] > 12 * 6 * 4 * 32 * 100_000  # 6 N per token, with some 0.1M in matrices
    rest = without(words, "--steps")
    record = run(script, *rest, "--flops", whole["flops"], "--out", tmp_path / "flops")
    assert record["steps"] == 12 and record["flops"] == whole["flops"]
    first, second = weights(tmp_path / "steps"), weights(tmp_path / "flops")
    assert all(torch.allclose(first[k], second[k], atol=1e-2) for k in first)
    half = run(script, *rest, "--flops", whole["flops"] / 2, "--out", tmp_path / "half")
    assert half["steps"] == 6 and half["flops"] >= whole["flops"] / 2


def test_the_teacher_is_charged(prepared_folder, teacher, tmp_path):
    """A teacher of the student's size: its forward pass is a third of the student's two passes."""
    words = ["--teacher", teacher, "--data", prepared_folder, *SMALL, "--steps", 3]
    alone = run(train_distillation, *words, "--alpha", 1, "--out", tmp_path / "alone")
    live = run(train_distillation, *words, "--out", tmp_path / "live")
    assert live["flops"] / alone["flops"] == pytest.approx(4 / 3, rel=0.03)


def test_seconds_become_steps_and_are_kept(prepared_folder, tmp_path, monkeypatch, capsys):
    """After 2 timed steps; a run that was stopped goes on to the same number."""
    monkeypatch.setattr(meter, "TIMED", 2)
    words = without(["--model", "nano", "--data", prepared_folder, *SMALL], "--steps")
    words += ["--seconds", "4", "--eval_every", "2", "--out", tmp_path / "run"]
    planned = []
    after = Meter.end_step

    def stop(self, step, labels):
        decides = after(self, step, labels)
        if self.planned_steps is not None and not planned:
            planned.append(self.planned_steps)
        if step == 5 and len(planned) == 1:
            planned.append("stopped")
            raise RuntimeError("stopped")
        return decides

    monkeypatch.setattr(Meter, "end_step", stop)
    with pytest.raises(RuntimeError):
        run(train_pretrain, *words)
    record = run(train_pretrain, *words, "--resume")
    assert f"--seconds 4: {planned[0]} steps" in capsys.readouterr().out
    assert record["steps"] == planned[0] >= 5


def test_costs_are_in_the_log_and_the_record(prepared_folder, teacher):
    with open(teacher / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    record = read_json(teacher / "run.json")
    assert float(rows[-1]["flops"]) == record["flops"] > 0
    assert int(rows[-1]["tokens"]) == record["tokens"]
    assert 0 < float(rows[0]["seconds"]) <= float(rows[-1]["seconds"]) <= record["seconds"]
    assert float(rows[0]["flops"]) == pytest.approx(record["flops"] / 12)


def test_the_record_has_the_hashes_of_what_it_was_made_from(prepared_folder, teacher, tmp_path):
    meta = read_json(prepared_folder / "meta.json")
    words = ["--teacher", teacher, "--data", prepared_folder, *SMALL, "--steps", 1]
    sources = run(train_distillation, *words, "--out", tmp_path / "run")["sources"]
    assert sources["data_sha256"] == meta["train"]["sha256"]
    assert sources["tokenizer_sha256"] == meta["tokenizer_sha256"]
    assert sources["teacher_sha256"] == read_json(teacher / "manifest.json")["sha256"][:1]


def test_steps_flops_and_seconds_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        train_pretrain.parse_args(["--steps", "3", "--flops", "1e9"])
    assert "not allowed with" in capsys.readouterr().err
