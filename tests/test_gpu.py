"""On a machine with CUDA: every method ends where it ends on the CPU, in float32 and in bfloat16.

    python -m pytest --gpu tests/test_gpu.py

Without --gpu no test sees the GPU."""

import importlib
import shlex

import pytest
import torch

import train_distill_reason
from eval.experiments.methods import ARMS
from model.device import choose_device
from tests.short_runs import make_teacher, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and --gpu")
# Each device has random numbers of its own: on the CPU alone, other draws end 3% apart.
DRAWN = ("10% labels", "10% labels, teacher wrong")
STEPS = "--steps 4 --batch_size 4 --seq_len 32 --eval_every 2 --warmup 1 --overwrite".split()


@pytest.fixture(scope="module")
def names(prepared_folder, tmp_path_factory):
    teacher = make_teacher(tmp_path_factory.mktemp("gpu"), prepared_folder)
    return {
        "student": "nano", "pair": f"--teacher {teacher} --student nano",
        **{name: teacher for name in ("teacher", "teacher1", "teacher2", "teacher3")},
    }  # fmt: skip


def ends_alike(script, words, data, tmp_path, within=0.01):
    words = [*words, "--data", data, *STEPS]
    on_cpu, *others = (
        run(script, *words, "--device", device, "--dtype", dtype, "--out", tmp_path / "run")
        for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16"))
    )
    for record in others:
        assert record["device"] != on_cpu["device"]
        # Not equal: see run/meter.py on shared key-value heads, as all presets have them.
        assert record["flops"] == pytest.approx(on_cpu["flops"], rel=0.03)
        loss = record["metrics"]["val_loss"]
        assert loss == pytest.approx(on_cpu["metrics"]["val_loss"], rel=within)


@pytest.mark.parametrize("name", ARMS)
def test_a_method(name, names, prepared_folder, tmp_path):
    script, *words = shlex.split(ARMS[name].format(**names))
    within = 0.06 if name in DRAWN else 0.01
    ends_alike(importlib.import_module(script), words, prepared_folder, tmp_path, within)


@pytest.mark.parametrize("fused", ["yes", "no"])
def test_the_fused_loss(fused, names, prepared_folder, tmp_path):
    script = importlib.import_module("train_distillation")
    words = [*shlex.split(names["pair"]), "--fused", fused]
    ends_alike(script, words, prepared_folder, tmp_path)


def test_reasoning(prepared_folder, tmp_path):
    data = prepared_folder / "reason_train.jsonl"
    ends_alike(train_distill_reason, ["--student", "nano"], data, tmp_path)


def test_auto_is_the_gpu():
    assert choose_device("auto").type == "cuda"
