"""Speed that must not change a result: batches made ahead are the same batches, the measurement
that chooses precision and compilation leaves no trace, and a resumed run keeps the choice. And the
benchmark counts what it says."""

import argparse
import csv
import threading
import time

import pytest
import torch
from torch import nn

from eval import benchmark, costs, timing
from model import ModelConfig, Transformer
from run import speed
from run.batches import Ahead
from run.files import write_json
from run.setup import autocast
from run.speed import measure, settle_speed

CPU = torch.device("cpu")


# Batches ahead of time.


def test_batches_ahead_are_the_batches_in_order():
    made = []

    def make(step):
        made.append((step, threading.current_thread()))
        return (torch.tensor(step), torch.tensor(step * step))

    batch_of = Ahead(make, 7, CPU)
    assert [tuple(map(int, batch_of(step))) for step in range(3, 7)] == [
        (step, step * step) for step in range(3, 7)
    ]
    assert [step for step, _ in made] == [3, 4, 5, 6]  # each once, none after the last
    assert threading.main_thread() not in [thread for _, thread in made]


def test_the_next_batch_is_made_while_this_one_is_used():
    begun = threading.Event()

    def make(step):
        if step == 1:
            begun.set()
        return (torch.tensor(step),)

    batch_of = Ahead(make, 2, CPU)
    batch_of(0)
    assert begun.wait(timeout=10)


def test_an_error_in_making_a_batch_comes_with_its_step():
    def make(step):
        if step == 1:
            raise ValueError("line 7 is broken")
        return (torch.tensor(step),)

    batch_of = Ahead(make, 3, CPU)
    batch_of(0)
    with pytest.raises(ValueError, match="line 7 is broken"):
        batch_of(1)


# Precision and compilation.


def model(size="nano"):
    torch.manual_seed(0)
    return Transformer(ModelConfig.preset(size, 64))


def flags(tmp_path, **more):
    values = dict(
        out=tmp_path, resume=False, dtype="auto", compile=None, steps=10, batch_size=4, seq_len=32
    )
    return argparse.Namespace(**{**values, **more})


def timed(monkeypatch, **seconds):
    """Let `measure` find these seconds; it is asked for no other precision."""
    monkeypatch.setattr(speed, "measure", lambda model, ids, dtype: seconds[dtype])
    monkeypatch.setattr(speed, "SMALLEST_FOR_BFLOAT16", 0 if "bfloat16" in seconds else 10**9)


@pytest.mark.parametrize(
    "times, dtype",
    [
        ({"float32": 1.0, "bfloat16": 0.5}, "bfloat16"),
        ({"float32": 1.0, "bfloat16": 0.95}, "float32"),  # too near to tell apart
        ({"float32": 1.0, "bfloat16": 2.0}, "float32"),
        ({"float32": 1.0}, "float32"),
    ],
)
def test_the_faster_precision_is_taken(tmp_path, monkeypatch, capsys, times, dtype):
    timed(monkeypatch, **times)
    args = flags(tmp_path)
    settle_speed(args, CPU, model(), model().requires_grad_(False))
    assert args.dtype == args.teacher_dtype == dtype and args.compile is False
    said = capsys.readouterr().out
    assert "student float32 1000 ms" in said and "teacher float32 1000 ms" in said
    assert said.strip().endswith(f"{dtype}; --no-compile")


def test_student_and_teacher_are_settled_apart(tmp_path, monkeypatch):
    student, teacher = model(), model().requires_grad_(False)
    seconds = {(student, "bfloat16"): 3.0, (teacher, "bfloat16"): 0.2}
    timed(monkeypatch, bfloat16=0)
    monkeypatch.setattr(speed, "measure", lambda *key: seconds.get((key[0], key[2]), 1.0))
    args = flags(tmp_path)
    settle_speed(args, CPU, student, teacher)
    assert (args.dtype, args.teacher_dtype) == ("float32", "bfloat16")
    args = flags(tmp_path, dtype="float32")  # what the user names is for both
    settle_speed(args, CPU, student, teacher)
    assert (args.dtype, args.teacher_dtype) == ("float32", "float32")


def test_the_precision_of_a_sweep_is_that_of_its_models_together(monkeypatch, tmp_path):
    """A student that gains too little to tell, 0.95, and a teacher that gains enough: 1.45 of 2."""
    from eval.experiments import common
    from eval.experiments.scales import SCALES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "SMALLEST_FOR_BFLOAT16", 0)
    student = Transformer(ModelConfig.preset(SCALES["quick"].student, 2048)).num_parameters()

    def measured(model, ids, dtype):
        gain = 0.95 if model.num_parameters() == student else 0.5
        return 1.0 if dtype == "float32" else gain

    monkeypatch.setattr(speed, "measure", measured)
    common.precision.cache_clear()
    assert common.precision(SCALES["quick"]) == "bfloat16"
    monkeypatch.setattr(speed, "measure", lambda *_: 1 / 0)
    common.precision.cache_clear()
    assert common.precision(SCALES["quick"]) == "bfloat16"  # out/quick/precision.json remembers
    common.precision.cache_clear()


@pytest.mark.parametrize("steps, compiles", [(100, False), (10_000, True)])
@pytest.mark.parametrize("compiler", [True, False])
def test_compiled_where_the_run_is_long_enough(tmp_path, monkeypatch, steps, compiles, compiler):
    """0.25 s for 512 tokens, 128 tokens a step: 6 s of training or 10 minutes and more."""
    timed(monkeypatch, float32=0.25)
    monkeypatch.setattr(speed, "compiler_for", lambda device: compiler)
    args = flags(tmp_path, steps=steps)
    settle_speed(args, CPU, model())
    assert args.compile is (compiles and compiler)


def test_what_the_user_says_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *_: 1 / 0)
    args = flags(tmp_path, dtype="bfloat16", compile=True)
    settle_speed(args, CPU, model())
    assert (args.dtype, args.teacher_dtype, args.compile) == ("bfloat16", "bfloat16", True)


@pytest.mark.parametrize("name", ["run.json", "resume/flags.json"])
def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch, name):
    monkeypatch.setattr(speed, "measure", lambda *_: 1 / 0)
    kept = {"dtype": "bfloat16", "teacher_dtype": "float32", "compile": True}
    write_json(tmp_path / name, {"args": kept} if name == "run.json" else kept)
    args = flags(tmp_path, resume=True)
    settle_speed(args, CPU, model(), model())
    assert {name: vars(args)[name] for name in kept} == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("learns", [True, False])
def test_the_measurement_leaves_no_trace(dtype, learns):
    student = model().requires_grad_(learns)
    before = [parameter.clone() for parameter in student.parameters()]
    state = torch.get_rng_state()
    assert 0 < measure(student, torch.arange(32).view(2, 16), dtype) < 60
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, earlier in zip(student.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, earlier)


def test_precision_holds_inside_another():
    """The teacher's float32 inside the student's bfloat16, and the other way round."""
    a = torch.ones(2, 2)
    with autocast(CPU, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
        with autocast(CPU, "float32"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "float32"), autocast(CPU, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16


# The benchmark.


def test_flops_are_those_of_the_matrices():
    """Every weight of a matrix multiplies once a token and a multiply-add is two operations."""
    config = ModelConfig.preset("mini", 64)
    weights = sum(
        module.in_features * module.out_features
        for module in Transformer(config).modules()
        if isinstance(module, nn.Linear)
    )
    assert timing.flops_per_token(config, 2, 0) == 2 * weights
    # Causal attention: on average S / 2 keys a query, two products (q k and p v), L layers.
    heads = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * (2 * heads * 100 / 2)
    assert timing.flops_per_token(config, 2, 100) == 2 * weights + attention
    assert timing.flops_per_token(config, 6, 100) == 3 * (2 * weights + attention)


def test_turns_are_timed_by_the_median(monkeypatch):
    naps = iter([0, 0, 0, 0, 0, 0] + [0.05, 0.01, 0.001, 0.01, 0.05, 0.01])
    order = []

    def step(name, tokens):
        def run():
            order.append(name)
            time.sleep(next(naps))
            return tokens

        return run

    variants = {"slow": step("slow", 10), "fast": step("fast", 20)}
    results, peak = timing.take_turns(variants, 3, CPU, "test")
    assert order[6:] == ["slow", "fast"] * 3
    assert peak > 1e8
    assert results["slow"]["tokens"] == 10 and results["fast"]["tokens"] == 20
    assert 0.04 < results["slow"]["seconds"] < 0.3 and 0.009 < results["fast"]["seconds"] < 0.04


def test_the_benchmark_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "B", 2)
    monkeypatch.setattr(benchmark, "S", 16)
    monkeypatch.setattr(
        benchmark,
        "GROUPS",
        {
            "pretraining": (benchmark.pretraining, ("nano",), 1),
            "distillation": (benchmark.distillation, ("nano<nano",), 1),
        },
    )
    argv = ["--no-compile", "--device", "cpu", "--out", str(tmp_path / "a.csv")]
    rows = benchmark.main(benchmark.parse_args(argv))
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["variant"] for row in written] == [row["variant"] for row in rows]
    assert {"plain", "fused", "cached top 64", "no teacher"} <= {r["variant"] for r in rows}
    assert float(written[0]["ratio"]) == 1.0
    for row in written:
        students = benchmark.STUDENTS if "students" in row["variant"] else 1
        tokens = 32 * students
        assert float(row["tokens_per_second"]) == pytest.approx(
            tokens / float(row["seconds"]), rel=0.1
        )
    assert "plain" in capsys.readouterr().out
    argv[-1:] = [str(tmp_path / "b.csv"), "--against", str(tmp_path / "a.csv")]
    benchmark.main(benchmark.parse_args(argv))
    assert capsys.readouterr().out.count("of before (ratio") == len(rows)


def test_groups_measured_apart_stand_in_one_file(tmp_path):
    def row(group, size, variant, speed):
        return {**dict.fromkeys(benchmark.COLUMNS, ""), "group": group, "size": size,
                "variant": variant, "tokens_per_second": speed}  # fmt: skip

    path = tmp_path / "results.csv"
    loss = "4096x32768"
    benchmark.write_results(path, [row("pretraining", "a size of old", "float32", 6)])
    benchmark.write_results(path, [row("loss", loss, "plain", 1), row("loss", loss, "fused", 2)])
    benchmark.write_results(path, [row("pretraining", "mini", "float32", 3)])
    benchmark.write_results(path, [row("pretraining", "nano", "float32", 5)])
    benchmark.write_results(path, [row("loss", loss, "plain", 4)])
    got = [(k, int(v["tokens_per_second"])) for k, v in benchmark.read_results(path).items()]
    assert got == [
        (("pretraining", "nano", "float32"), 5),
        (("pretraining", "mini", "float32"), 3),
        (("loss", loss, "plain"), 4),
        (("pretraining", "a size of old", "float32"), 6),
    ]


def test_bad_benchmark_flags(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for words, message in (
        (["--against", str(tmp_path / "bad.csv")], "bad.csv is not a CSV of this benchmark"),
        (["--against", "nowhere.csv"], "nowhere.csv is not a CSV"),
        (["--only", "generation", "--size", "huge"], "--size huge is no size of group generation"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.main(benchmark.parse_args([*words, "--device", "cpu"]))


def test_costs_are_those_of_the_formula(tmp_path):
    """26M on 0.52B tokens: 6 * 26e6 * 520e6 operations at 0.4 * 989 TFLOP/s are 3.4 minutes."""
    seconds = 6 * 26e6 * 520e6 / (0.4 * 989e12)
    assert costs.hours(6 * 26e6 * 520e6, "one H100") == f"{seconds / 60:.0f} min" == "3 min"
    assert costs.hours(3600 * 60e12 * 0.35 * 5, "laptop GPU") == "5.0 h"
    assert costs.hours(3600 * 60e12 * 0.35 * 72, "laptop GPU") == "3 d"
    assert "| 26M     | 7B      | 90.7 " in costs.break_even()  # (6 * 26 + 2 * 7000) / (6 * 26)


def test_costs_hold_the_model_against_the_benchmark(tmp_path):
    rows = [
        {"group": "distillation", "size": "nano<mini", "variant": variant, "ratio": 1.0,
         "tokens_per_second": speed, "memory_mb": 1.0, "flops_share": "", "device": "x", "torch": 2}
        for variant, speed in (("fused", 40), ("cached top 64", 95), ("no teacher", 100))
    ]  # fmt: skip
    benchmark.write_results(tmp_path / "results.csv", rows)
    costs.main(costs.parse_args(["--results", str(tmp_path / "results.csv")]))
    text = (tmp_path / "README.md").read_text("utf-8")
    # nano 0.17M and mini 0.94M at V = 1,024: 6 * 0.17 / (6 * 0.17 + 2 * 0.94), and attention
    assert "| nano<mini       | 0.35        | 0.40     | 1.00          | 0.95     |" in text
