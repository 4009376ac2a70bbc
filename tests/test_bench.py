"""The benchmark counts what it says, and costs follow the formula."""

import csv
import time

import pytest
import torch

from bench import benchmark, costs, timing
from model import ModelConfig, Transformer

CPU = torch.device("cpu")


def test_turns_are_timed_by_the_median(monkeypatch):
    naps = iter([0, 0, 0, 0, 0, 0] + [0.05, 0.01, 0.001, 0.01, 0.05, 0.01])
    order, a = [], torch.ones(30, 40)

    def step(name, tokens):
        def run():
            order.append(name)
            a.T @ a
            time.sleep(next(naps))
            return tokens

        return run

    monkeypatch.setattr(timing, "matmul_flops", lambda device: 1e6)
    slow, fast = timing.take_turns(
        {"slow": step("slow", 10), "fast": step("fast", 20)}, 3, CPU, "x"
    )
    assert order[6:] == ["slow", "fast"] * 3
    assert (slow["variant"], slow["ratio"], fast["variant"]) == ("slow", 1.0, "fast")
    assert 0.04 < slow["seconds"] < 0.3 and 0.009 < fast["seconds"] < 0.04
    for row, tokens in ((slow, 10), (fast, 20)):
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"], rel=0.1)
        flops = 2 * 40 * 30 * 40  # of a.T @ a, at 1e6 per second
        assert row["flops_share"] == pytest.approx(flops / 1e6 / row["seconds"], rel=0.05)
    assert fast["ratio"] == pytest.approx(2 * slow["seconds"] / fast["seconds"], rel=0.05)


def test_a_large_product_takes_its_time():
    assert timing.matmul_flops(CPU, 512) > 1e8


def variants(monkeypatch, ways, sizes="nano<nano"):
    monkeypatch.setattr(benchmark, "B", 2)
    monkeypatch.setattr(benchmark, "S", 16)
    return benchmark.distillation(sizes, CPU, ways)


def test_what_is_timed_are_the_lessons_losses(monkeypatch):
    """plain and fused are one loss, to the last digits; a cache of 64 tokens is near to it."""
    made = []
    monkeypatch.setattr(
        benchmark.Bench, "step", lambda pair, loss_of, precision: made.append(loss_of)
    )
    names = list(variants(monkeypatch, [(False, "float32")]))
    found = {name: loss_of() for name, loss_of in zip(names, made, strict=True)}
    loss, parts = found["plain"]
    fused, fused_parts = found["fused"]
    assert fused.item() == pytest.approx(loss.item(), rel=1e-5)
    for name in ("ce", "kl"):
        assert fused_parts[name].item() == pytest.approx(parts[name].item(), rel=1e-4)
    assert found["cached hidden"][0].item() == pytest.approx(loss.item(), rel=1e-4)
    assert found["cached top 64"][1]["ce"].item() == pytest.approx(parts["ce"].item(), rel=1e-5)
    assert 0 < found["cached top 64"][1]["kl"].item() < parts["kl"].item()
    assert found["no teacher"][0].item() == pytest.approx(parts["ce"].item(), rel=1e-5)


def test_every_variant_in_every_way(monkeypatch):
    ways = [(False, "float32"), (False, "bfloat16"), (True, "float32"), (True, "bfloat16")]
    names = ("plain", "fused", "cached hidden", "cached top 64", "no teacher")
    endings = ("", ", bfloat16", ", compiled", ", bfloat16, compiled")
    assert list(variants(monkeypatch, ways)) == [name + how for how in endings for name in names]


@pytest.mark.parametrize("native, words, low", [(True, [], True), (False, [], False),
                                               (False, ["--bfloat16"], True)])  # fmt: skip
def test_bfloat16_where_the_machine_has_it_or_is_told(tmp_path, monkeypatch, native, words, low):
    rule = {True: "bfloat16", False: "float32"}[native]
    monkeypatch.setattr(benchmark.machine, "choose_precision", lambda name, device: rule)
    asked = []
    monkeypatch.setattr(benchmark, "take_turns", lambda *args: [])

    def make(size, device, ways):
        asked.extend(ways)
        return {}

    monkeypatch.setitem(benchmark.GROUPS, "pretraining", (make, ("nano",), 1))
    words += ["--only", "pretraining", "--no-compile", "--out", str(tmp_path / "a.csv")]
    benchmark.main(benchmark.parse_args(words))
    assert asked == [(False, "float32"), (False, "bfloat16")][: 1 + low]


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
    assert list(written[0]) == benchmark.COLUMNS
    assert [row["variant"] for row in written] == [row["variant"] for row in rows]
    assert {"plain", "fused", "cached top 64", "no teacher"} <= {r["variant"] for r in rows}
    assert float(written[0]["ratio"]) == 1.0
    for row in written:
        speed, seconds = float(row["tokens_per_second"]), float(row["seconds"])
        assert speed == pytest.approx(2 * 16 / seconds, rel=0.1)
    assert "plain" in capsys.readouterr().out
    argv[-1:] = [str(tmp_path / "b.csv"), "--against", str(tmp_path / "a.csv")]
    benchmark.main(benchmark.parse_args(argv))
    assert capsys.readouterr().out.count("of before (ratio") == len(rows)


def test_generation_counts_the_new_tokens():
    model = benchmark.generation("nano", CPU, [])
    assert model["one at a time, cache"]() == 4 * 64


def test_groups_measured_apart_stand_in_one_file(tmp_path):
    def row(group, size, variant, speed):
        return {**dict.fromkeys(benchmark.COLUMNS, ""), "group": group, "size": size,
                "variant": variant, "tokens_per_second": speed}  # fmt: skip

    path = tmp_path / "results.csv"
    loss = "4096x32768"
    benchmark.write_results(path, [row("pretraining", "an earlier size", "float32", 6)])
    benchmark.write_results(path, [row("loss", loss, "plain", 1), row("loss", loss, "fused", 2)])
    benchmark.write_results(path, [row("pretraining", "mini", "float32", 3)])
    benchmark.write_results(path, [row("pretraining", "nano", "float32", 5)])
    benchmark.write_results(path, [row("loss", loss, "plain", 4)])
    got = [(k, int(v["tokens_per_second"])) for k, v in benchmark.read_results(path).items()]
    assert got == [
        (("pretraining", "nano", "float32"), 5),
        (("pretraining", "mini", "float32"), 3),
        (("loss", loss, "plain"), 4),
        (("pretraining", "an earlier size", "float32"), 6),
    ]


def test_bad_benchmark_flags(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for words, message in (
        (["--against", str(tmp_path / "bad.csv")], "bad.csv is not a CSV of this benchmark"),
        (["--against", "nowhere.csv"], "nowhere.csv is not a CSV"),
        (["--rounds", "0"], "--rounds 0 must be between 1 and 1,000,000"),
        (["--only", "generation", "--size", "huge"], "--size huge is no size of group generation"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.main(benchmark.parse_args([*words, "--device", "cpu"]))


# Costs.


def test_costs_are_those_of_the_formula():
    """26M on 0.52B tokens: 6 * 26e6 * 520e6 operations at 0.4 * 989 TFLOP/s are 3.4 minutes."""
    seconds = 6 * 26e6 * 520e6 / (0.4 * 989e12)
    assert costs.hours(6 * 26e6 * 520e6, "one H100") == f"{seconds / 60:.0f} min" == "3 min"
    assert costs.hours(3600 * 60e12 * 0.35 * 5, "laptop GPU") == "5.0 h"
    assert costs.hours(3600 * 60e12 * 0.35 * 72, "laptop GPU") == "3 d"
    line = next(
        line for line in costs.paper_table().splitlines() if line.startswith("| 26M     | 7B")
    )
    # 258 bytes for each of 0.52B tokens; (6 * 26 + 2 * 7000) / (6 * 26) and, of two students,
    # (12 * 26 + 4 * 7000) / (12 * 26 + 2 * 7000)
    assert [cell.strip() for cell in line.split("|")][-4:-1] == ["134 GB", "90.7", "1.98"]


def test_costs_hold_the_model_against_the_benchmark(tmp_path):
    """Three times the operations and 0.4 of the speed: 1.2 of the share of the peak."""
    rows = [
        {"group": "distillation", "size": "nano<mini", "variant": variant, "ratio": 1.0,
         "tokens_per_second": speed, "memory_mb": 1.0, "flops_share": share, "device": "x",
         "torch": 2}
        for variant, speed, share in (
            ("fused", 40, 0.36), ("cached top 64", 95, 0.285), ("no teacher", 100, 0.3)
        )
    ]  # fmt: skip
    benchmark.write_results(tmp_path / "results.csv", rows)
    costs.main(costs.parse_args(["--results", str(tmp_path / "results.csv")]))
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "| nano<mini       | 0.33        | 0.40     | 1.00          | 0.95     |" in text


def test_operations_counted_are_those_of_the_matrices(monkeypatch):
    """6 N per token for a student, 2 N more for its teacher, and attention: 4 H S d forward."""
    flops = {}

    def turns(found, rounds, device, name):
        for variant, step in found.items():
            with timing.CountFlops() as counter:
                flops[variant] = counter, step()
        return []

    turns(variants(monkeypatch, [(False, "float32")], "nano<micro"), 1, CPU, "")
    counted = {name: counter.flops / tokens for name, (counter, tokens) in flops.items()}

    def per_token(size, factor, attention_factor):
        model = Transformer(ModelConfig.preset(size, 1024))
        config = model.config
        linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
        matrices = sum(m.in_features * m.out_features for m in linear)
        heads = config.num_attention_heads * config.head_dim
        return factor * matrices + attention_factor * config.num_hidden_layers * heads * 16

    own, live = per_token("nano", 6, 4 + 10), per_token("micro", 2, 4)
    assert counted["no teacher"] == counted["cached top 64"] == pytest.approx(own, rel=1e-6)
    assert counted["plain"] == pytest.approx(own + live, rel=1e-6)
    assert counted["fused"] == pytest.approx(own + live, rel=1e-6)
