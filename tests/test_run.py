"""What every run shares: the schedule, the optimizer's groups, the flags' ranges, the device."""

import argparse
import math
import os
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from files import check_ranges
from files.command import RANGES
from model import ModelConfig, Transformer
from model.device import autocast, available_cores, choose_device, choose_precision, prepare_process
from run import Run
from run import optimizer as optimizer_module
from run.flags import add_common_flags, check_flags
from run.optimizer import Optimizer, learning_rate

TINY = ModelConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, intermediate_size=12, max_position_embeddings=32,
)  # fmt: skip


def flags(*argv, **defaults):
    """The common flags, as a script would parse them."""
    parser = argparse.ArgumentParser()
    add_common_flags(parser, out="out/none", **defaults)
    return parser.parse_args([str(word) for word in argv])


def tiny_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    return Transformer(config)


# The schedule.


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.5),  # 2 * 1/4
        (1, 1.0),
        (3, 2.0),
        (4, 2.0),  # the cosine begins at the peak
        (6, 2 * (0.55 + 0.45 * math.sqrt(0.5))),  # a quarter of the way
        (8, 1.1),  # half of the way: (1 + 0.1) / 2 of the peak
        (12, 0.2),  # a tenth
    ],
)
def test_learning_rate_by_hand(step, expected):
    args = flags("--learning_rate", 2.0, "--warmup", 4, "--steps", 12)
    assert learning_rate(step, args.steps, args) == pytest.approx(expected)


@pytest.mark.parametrize("warmup, steps", [(0, 10), (10, 10), (50, 10), (1, 1)])
def test_learning_rate_stays_in_range(warmup, steps):
    """A warm-up as long as the run, or longer, divides by nothing."""
    args = flags("--learning_rate", 1.0, "--warmup", warmup, "--steps", steps)
    rates = [learning_rate(step, steps, args) for step in range(steps)]
    assert all(0 < rate <= 1.0 for rate in rates)
    assert rates[0] == pytest.approx(1.0 / max(1, warmup))


# The optimizer.


def held_by(part, student):
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {names[id(p)]: group for group in part.param_groups for p in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_hidden_matrices_only(tied):
    config = ModelConfig(**{**vars(TINY), "tie_word_embeddings": tied, "qk_norm": True})
    student = tiny_model(config=config)
    optimizer = Optimizer([student], flags("--weight_decay", 0.3))
    muon, adamw = (held_by(part, student) for part in optimizer.parts)
    layers = [f"model.layers.{n}." for n in (0, 1)]
    assert set(muon) == {
        f"{layer}{name}_proj.weight"
        for layer in layers
        for name in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    everything = {name for name, _ in student.named_parameters()}
    assert set(adamw) == everything - set(muon)
    for name, group in adamw.items():
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
    assert {group["weight_decay"] for group in muon.values()} == {0.3}


def test_adamw_alone_holds_everything_once():
    student = tiny_model(config=ModelConfig(**{**vars(TINY), "attention_bias": True}))
    optimizer = Optimizer([student], flags("--optimizer", "adamw", "--weight_decay", 0.3))
    (held,) = (held_by(part, student) for part in optimizer.parts)
    assert sum(len(g["params"]) for g in optimizer.parts[0].param_groups) == len(held)
    assert set(held) == {name for name, _ in student.named_parameters()}
    for name, group in held.items():
        vector = "norm" in name or name.endswith("bias")
        assert group["weight_decay"] == (0.0 if vector else 0.3), name


def one_step(optimizer, step=0) -> float:
    """What Run does with a gradient; returns the rate."""
    optimizer.clip()
    rate = learning_rate(step, optimizer.args.steps, optimizer.args)
    optimizer.update(rate)
    return rate


def set_gradients(student, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_first_adamw_update_by_hand():
    """Bias-corrected, the first moment over the root of the second is the sign of the gradient."""
    student = tiny_model()
    args = flags("--learning_rate", 0.1, "--warmup", 10, "--weight_decay", 0.5)
    optimizer = Optimizer([student], args)
    set_gradients(student)
    embedding, norm = student.model.embed_tokens.weight, student.model.norm.weight
    before = [(p.detach().clone(), p.grad.sign()) for p in (embedding, norm)]
    rate = one_step(optimizer)
    assert rate == pytest.approx(0.01)  # 0.1 * 1/10
    (w, sign), (g, norm_sign) = before
    torch.testing.assert_close(embedding, w * (1 - 0.01 * 0.5) - 0.01 * sign, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm, g - 0.01 * norm_sign, rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_muon_update_is_nearly_orthogonal():
    """All singular values are near 0.2 * sqrt(larger side) * rate, whatever the gradient's are."""
    student = tiny_model(config=ModelConfig.preset("nano", 11))
    args = flags("--learning_rate", 0.1, "--warmup", 0, "--weight_decay", 0.0)
    optimizer = Optimizer([student], args)
    set_gradients(student)
    matrix = student.model.layers[0].mlp.up_proj.weight  # (192, 64)
    spread = torch.linalg.svdvals(matrix.grad)
    assert spread.max() / spread.min() > 3
    before = matrix.detach().clone()
    one_step(optimizer)
    values = torch.linalg.svdvals(before - matrix.detach()) / (0.1 * 0.2 * math.sqrt(192))
    assert 0.6 < values.min() and values.max() < 1.3


class Dtypes(TorchDispatchMode):
    """The dtypes of all matrix products inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", ["bfloat16", "float32"])
def test_muon_multiplies_in_what_the_machine_multiplies_in(native, monkeypatch):
    """bfloat16 only where the machine has instructions for it; both find the same update."""
    monkeypatch.setattr(optimizer_module, "choose_precision", lambda name, device: native)
    student = tiny_model()
    optimizer = Optimizer([student], flags("--weight_decay", 0.0))
    set_gradients(student)
    matrix = student.model.layers[0].self_attn.q_proj.weight
    gradient, before = matrix.grad.double(), matrix.detach().clone()
    with Dtypes() as dtypes:
        one_step(optimizer)
    assert dtypes.seen == {getattr(torch, native)}
    update = (before - matrix.detach()).double()
    expected = gradient / gradient.norm()  # Newton-Schulz in float64, of Jordan et al.
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.775 * gram + 2.0315 * gram @ gram) @ expected
    cosine = (update * expected).sum() / update.norm() / expected.norm()
    assert cosine > {"bfloat16": 0.999, "float32": 1 - 1e-6}[native]


@pytest.mark.parametrize("clip, expected", [(0.5, 0.5), (100.0, 8.0), (0.0, 8.0)])
def test_the_gradient_is_clipped_as_a_whole(clip, expected):
    """A plain step of rate 1 moves the weights by exactly the clipped gradient."""
    student = tiny_model()
    args = flags("--learning_rate", 1.0, "--warmup", 0, "--grad_clip", clip)
    optimizer = Optimizer([student], args)
    optimizer.parts = [torch.optim.SGD(student.parameters(), lr=9.9)]
    set_gradients(student)
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).norm()
    for parameter in student.parameters():
        parameter.grad *= 8.0 / norm
    before = torch.cat([p.detach().flatten() for p in student.parameters()])
    one_step(optimizer)
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert (after - before).norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_module_that_is_no_transformer_learns_by_adamw_without_decay():
    student, projection = tiny_model(), torch.nn.Linear(8, 5)
    optimizer = Optimizer([student, projection], flags("--weight_decay", 0.3))
    *_, extra = optimizer.parts
    assert type(extra) is torch.optim.AdamW
    assert held_by(extra, projection).keys() == {"weight", "bias"}
    assert {group["weight_decay"] for group in extra.param_groups} == {0.0}


def test_frozen_parameters_are_left_alone():
    student = tiny_model()
    student.model.requires_grad_(False)
    student.lm_head.weight.requires_grad_(True)  # tied: the embedding too
    (part,) = Optimizer([student, tiny_model().requires_grad_(False)], flags()).parts
    assert [len(group["params"]) for group in part.param_groups] == [1]


def test_scale_comes_before_clipping():
    """clip(scale) clips scale * gradient, and tells that one's norm."""
    student = tiny_model()
    optimizer = Optimizer([student], flags("--grad_clip", 3.0))
    set_gradients(student)
    gradients = [p.grad for p in student.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert optimizer.clip(torch.tensor(2.0)).item() == pytest.approx(2 * norm.item(), rel=1e-5)
    assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(3, rel=1e-4)


# Flags.


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("steps", 0),
        ("batch_size", 0),
        ("seq_len", 1),
        ("accumulation_steps", 0),
        ("accumulation_steps", 17),  # the default batch has 16 rows
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("grad_clip", -1.0),
        ("grad_clip", math.nan),
        ("flops", 0.0),
        ("flops", math.inf),
        ("seconds", 0.0),
        ("seconds", math.nan),
        ("eval_every", 0),
        ("final_eval", 0),
        ("patience", -1),
    ],
)
def test_common_flags_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        check_flags(flags(f"--{name}={value}"))


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("alpha", 0.0, 1.0),
        ("temperature", 1e-3, 1e3),
        ("data_share", 1e-6, 1.0),
        ("tag_weight", 0.0, None),
        ("think_weight", 0.0, None),
        ("answer_weight", 0.0, None),
    ],
)
def test_flags_of_single_scripts_have_ranges(name, low, high):
    args = flags()
    bad = [low - 1e-4, -math.inf, math.inf, math.nan] + ([] if high is None else [high * 1.01])
    for value in bad:
        setattr(args, name, value)
        with pytest.raises(ValueError, match=f"--{name} "):
            check_flags(args)
    for value in [low, 1.0] + ([] if high is None else [high]):
        setattr(args, name, value)
        check_flags(args)


def test_every_range_has_both_of_its_ends():
    for name, (low, high) in RANGES.items():
        check_ranges(argparse.Namespace(**{name: low}))
        check_ranges(argparse.Namespace(**{name: high}))
        for value in (low - 1, 2 * high, math.nan):
            with pytest.raises(ValueError, match=re.escape(f"--{name} {value} must be between")):
                check_ranges(argparse.Namespace(**{name: value}))


def test_defaults_and_limits_pass():
    check_flags(flags())
    check_flags(flags("--batch_size", 1, "--steps", 1, "--warmup", 0, "--grad_clip", 0))
    check_flags(flags("--batch_size", 4, "--accumulation_steps", 4))


def test_a_script_can_change_defaults():
    assert flags(learning_rate=0.5).learning_rate == 0.5
    assert flags("--learning_rate", 0.25, learning_rate=0.5).learning_rate == 0.25


def test_resume_excludes_overwrite(capsys):
    with pytest.raises(SystemExit):
        flags("--resume", "--overwrite")
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--steps", 5, "--flops", 5), ("--flops", 5, "--seconds", 5)])
def test_a_run_has_one_budget(words, capsys):
    with pytest.raises(SystemExit):
        flags(*words)
    assert "not allowed with" in capsys.readouterr().err


# Device, precision, threads.


def test_a_run_seeds_everything():
    draws = []
    for seed in (5, 5, 6):
        assert Run(flags("--seed", seed, "--device", "cpu")).device == torch.device("cpu")
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="--steps 0"):
        Run(flags("--steps", 0))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="--device"):
        choose_device(name)


def test_precision_of_the_forward_pass():
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    for name, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(cpu, name):
            assert (x @ x).dtype == expected


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_precision_follows_the_machine(device, avx512, amx, monkeypatch):
    """bfloat16 on CUDA and on a CPU that multiplies in it; asked for by name, whatever it is."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    device = torch.device(device)
    native = device.type == "cuda" or (device.type == "cpu" and (avx512 or amx))
    assert choose_precision("auto", device) == ("bfloat16" if native else "float32")
    for name in ("float32", "bfloat16"):
        assert choose_precision(name, device) == name


def test_available_cores():
    assert 1 <= available_cores() <= os.cpu_count()


@pytest.mark.parametrize("said, kept", [(None, "384"), ("7", "7")])
def test_few_compiled_kernels_are_kept(monkeypatch, said, kept):
    """384 in every training run, unless the user says how many."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, said or "")  # so that the end of the test undoes what is set
    if said is None:
        monkeypatch.delenv(name)
    prepare_process(seed=0, processes=1)
    assert os.environ[name] == kept
