"""Quantisation: the grid and its gradients (by hand, against torch's own, and against numpy), what
stands on disk, and a run: at 16 bits the plain method, at fewer a student on the grid."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_distillation
from dataset.packing import PackedText
from distill import kl_divergence
from methods import quantize
from methods.quantize import compute_loss
from model import ModelConfig, Transformer, load_model, make_or_load, save_model
from model.quantize import (
    channel_scale,
    fake_quantize,
    limits,
    load_quantized,
    pack,
    quantized_weights,
    save_quantized,
    unpack,
)
from tests.short_runs import (
    SIX,
    check_resume,
    logged,
    make_teacher,
    nearly_equal,
    run,
    same_bits,
    weights,
)

BITS = (2, 3, 4, 8)
# At 2 bits, levels -2 to 1. A step of 1 rounds the small ones to 0: error 4 * 0.16 = 0.64. Of the
# steps 1, 0.9 ... 0.3 the best is 0.5: error 0.25 for the 1 that is clipped, 4 * 0.01 for the rest.
ROW = [[1.0, 0.4, 0.4, -0.4, -0.4]]


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("quantize"), prepared_folder)


def some_weight(rows=6, columns=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows)[:, None]  # rows of very different size
    return sizes * torch.randn(rows, columns, generator=generator)


def small_model(tied=True, seed=0):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(50, 16, 2, 2, 1, 8, 27, tie_word_embeddings=tied))


# The grid.


def test_a_row_by_hand():
    weight = torch.tensor(ROW, requires_grad=True)
    assert channel_scale(weight, 2).item() == pytest.approx(0.5, rel=1e-6)
    quantised = fake_quantize(weight, 2)
    torch.testing.assert_close(quantised, torch.tensor([[0.5, 0.5, 0.5, -0.5, -0.5]]))
    (2 * quantised).sum().backward()
    assert weight.grad.tolist() == [[0.0, 2.0, 2.0, 2.0, 2.0]], "the clipped 1 must not learn"


def test_a_straight_through_gradient_without_the_clip_is_told_apart():
    """Widely copied: w + (quantised - w).detach(), whose gradient is 1 everywhere."""

    def mutant(weight, bits):
        return weight + (fake_quantize(weight, bits) - weight).detach()

    weight = torch.tensor(ROW, requires_grad=True)
    assert torch.allclose(mutant(weight, 2), fake_quantize(weight, 2))  # no value betrays it
    mutant(weight, 2).sum().backward()
    assert weight.grad[0, 0] == 1.0 and weight.grad.tolist() != [[0.0, 1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_value_and_gradient_are_those_of_torch_s_own_fake_quantisation(bits):
    weight = some_weight().requires_grad_()
    scale = channel_scale(weight, bits)[:, 0]
    zero, (low, high) = torch.zeros(len(scale), dtype=torch.int32), limits(bits)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, low, high)
    ours = fake_quantize(weight, bits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    upstream = some_weight(seed=1)
    grads = [torch.autograd.grad((x * upstream).sum(), weight)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert bits > 4 or (grads[0] == 0).any(), "nothing was clipped: the test shows too little"


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_is_the_slope_of_the_clip(bits):
    """By finite differences of s * clip(w / s), half a step wider: what rounds to it learns."""
    weight = some_weight().double().requires_grad_()
    scale, (low, high) = channel_scale(weight, bits), limits(bits)

    def clipped(w):
        return scale * (w / scale).clamp(low - 0.5, high + 0.5)

    fake_quantize(weight, bits).sum().backward()
    step = 1e-6 * scale
    slope = (clipped(weight + step) - clipped(weight - step)) / (2 * step)
    torch.testing.assert_close(weight.grad, slope.detach().round(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_the_best_of_eight(bits):
    """Against a search in numpy's float64, row by row."""
    weight = some_weight(seed=2)
    low, high = limits(bits)
    for row, found in zip(weight.double().numpy(), channel_scale(weight, bits), strict=True):
        errors = {}
        for tenths in range(3, 11):
            step = np.abs(row).max() / high * tenths / 10
            errors[step] = ((step * np.clip(np.rint(row / step), low, high) - row) ** 2).sum()
        assert found.item() == pytest.approx(min(errors, key=errors.get), rel=1e-5)


def test_each_row_has_a_grid_of_its_own():
    """One step for the whole matrix leaves nothing of its smallest rows."""
    weight = some_weight()

    def mutant(weight, bits):
        return fake_quantize(weight.flatten()[None], bits).view_as(weight)

    for bits in (2, 3, 4):
        ours, theirs = fake_quantize(weight, bits), mutant(weight, bits)
        relative = (ours - weight).norm(dim=1) / weight.norm(dim=1)
        assert (relative < {2: 0.6, 3: 0.35, 4: 0.16}[bits]).all(), relative
        assert not theirs[0].any() and ours[0].any()


def test_more_bits_are_nearer_and_every_row_has_at_most_2_to_the_b_values():
    weight = some_weight(columns=600)
    errors = []
    for bits in BITS:
        quantised = fake_quantize(weight, bits)
        assert all(len(row.unique()) <= 2**bits for row in quantised)
        errors.append((quantised - weight).norm().item())
    assert all(more < 0.6 * fewer for fewer, more in zip(errors, errors[1:], strict=False))


def test_limits_and_16_bits():
    assert [limits(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
    weight = some_weight().requires_grad_()
    assert fake_quantize(weight, 16) is weight
    for bits in (1, 9, 12, 32):
        with pytest.raises(ValueError, match=f"--bits {bits} .* 2 to 8"):
            fake_quantize(weight, bits)
    assert not fake_quantize(torch.zeros(2, 3), 4).any()  # no 0 / 0


# On disk.


def test_packing_by_hand():
    """The first level in the lowest bits, negative ones in two's complement."""
    assert pack(torch.tensor([[-8, 7, -1, 0]]), 4).tolist() == [[8 + 16 * 7, 15 + 16 * 0]]
    assert pack(torch.tensor([[-2, 1, -1, 0, 1]]), 2).tolist() == [[2 + 4 * 1 + 16 * 3, 1]]
    assert pack(torch.tensor([[-128, 127, -1]]), 8).tolist() == [[-128, 127, -1]]
    assert unpack(torch.tensor([[120, 15]], dtype=torch.uint8), 4, 3).tolist() == [[-8, 7, -1]]


@pytest.mark.parametrize("width", (2, 4, 8))
@pytest.mark.parametrize("columns", (1, 7, 64))
def test_packing_and_unpacking_give_the_levels_back(width, columns):
    low, high = limits(width)
    levels = torch.randint(low, high + 1, (5, columns), generator=torch.Generator().manual_seed(0))
    packed = pack(levels, width)
    assert packed.element_size() == 1 and packed.shape == (5, -(-columns * width // 8))
    found = unpack(packed, width, columns)
    assert torch.equal(found, levels.int())
    unsigned = found % 2**width  # the mutant that forgets the sign
    assert not torch.equal(unsigned, levels.int())


@pytest.mark.parametrize("bits", (*BITS, 16))
@pytest.mark.parametrize("embeddings, tied", [(False, True), (True, True), (True, False)])
def test_what_is_saved_loads_to_equal_logits(bits, embeddings, tied, tmp_path):
    model, rounded = small_model(tied), small_model(tied)
    rounded.load_state_dict(quantized_weights(model, bits, embeddings), strict=False)
    save_model(rounded, tmp_path)
    size = save_quantized(model, tmp_path, bits, embeddings)
    ids = torch.arange(24).view(2, 12)
    loaded = load_quantized(tmp_path)
    assert torch.equal(loaded(ids), rounded(ids)), "what is on disk is not what was trained"
    assert torch.equal(loaded(ids), load_model(tmp_path)(ids))
    assert (bits == 16) == torch.equal(loaded(ids), model(ids))
    head, embedding = loaded.lm_head.weight, model.model.embed_tokens.weight
    assert tied == (head is loaded.model.embed_tokens.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, embedding) == (
        not embeddings or bits == 16
    )
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert size == (tmp_path / "quantized.safetensors").stat().st_size


def test_levels_take_a_half_byte_on_disk(tmp_path):
    model = small_model()
    for bits, each, dtype in ((8, 1, torch.int8), (4, 0.5, torch.uint8), (2, 0.25, torch.uint8)):
        save_quantized(model, tmp_path, bits)
        tensors = load_file(tmp_path / "quantized.safetensors")
        down = tensors["model.layers.1.mlp.down_proj.weight"]  # (16, 27)
        assert down.dtype == dtype and down.shape == (16, -(-27 * each // 1))
        assert tensors["model.layers.1.mlp.down_proj.weight.scale"].shape == (16, 1)
        assert tensors["model.embed_tokens.weight"].dtype == torch.float32
        assert len(tensors) == 2 * 14 + 6, "a tensor is missing or left over"


def test_a_file_that_is_damaged_missing_or_of_another_model_is_refused(tmp_path):
    save_model(small_model(), tmp_path)
    with pytest.raises(ValueError, match="quantized.safetensors cannot be read"):
        load_quantized(tmp_path)
    other = Transformer(ModelConfig(50, 16, 3, 2, 1, 8, 27))
    save_quantized(other, tmp_path, 4)
    with pytest.raises(ValueError, match="quantise the model again"):
        load_quantized(tmp_path)
    (tmp_path / "quantized.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_quantized(tmp_path)


# The loss.


def batch(V=30):
    generator = torch.Generator().manual_seed(4)
    student, teacher = 2 * torch.randn(2, 2, 5, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (2, 5), generator=generator)
    labels[0, 3:] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.0), (2.0, 0.3), (1.0, 1.0)])
def test_the_loss_is_lesson_2_s(temperature, alpha):
    """And a teacher at -inf, or a NaN where there is no label, leaks nowhere."""
    student, teacher, labels = batch()
    teacher[0, 0, 3] = -torch.inf
    expected = train_distillation.compute_loss(student, teacher, labels, temperature, alpha)
    found = compute_loss(student, teacher, labels, temperature, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, student)[0] for loss, _ in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    assert grads[0].isfinite().all()
    teacher[0, 4], spoilt = torch.nan, student.detach().clone()
    spoilt[0, 3] = torch.nan
    spoilt = compute_loss(spoilt, teacher, labels, temperature, alpha)[0]
    torch.testing.assert_close(spoilt, expected[0].detach(), rtol=1e-12, atol=0)


def test_a_teacher_that_shares_the_quantised_layers_teaches_nothing():
    """The trap, as a mutant: the teacher is the model itself, whose weights were swapped in place
    (deepcopy came too late), so that its KL and every gradient are 0."""
    model = small_model()
    ids, labels = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    apart = copy.deepcopy(model)
    quantised = quantized_weights(model, 2)
    student_logits = torch.func.functional_call(model, quantised, (ids,))
    loss, _ = compute_loss(student_logits, apart(ids).detach(), labels, 1.0, 0.0)
    assert loss > 1e-6 and torch.equal(model(ids), apart(ids)), "the model itself was changed"
    model.load_state_dict(quantised, strict=False)
    mutant, _ = compute_loss(student_logits, model(ids).detach(), labels, 1.0, 0.0)
    assert mutant.abs() < 1e-9


def test_a_teacher_wins_back_what_rounding_lost():
    """A tiny model at 2 bits, its embeddings too: 40 steps of Adam take away most of the KL."""
    model, ids = small_model(), torch.randint(50, (8, 12), generator=torch.manual_seed(1))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # else all its words are alike
    teacher_logits, labels = model(ids).detach(), torch.zeros_like(ids)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(41):
        weights = quantized_weights(model, 2, True)
        logits = torch.func.functional_call(model, weights, (ids,))
        loss, _ = compute_loss(logits, teacher_logits, labels, 1.0, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.02 and losses[-1] < 0.5 * losses[0], losses[::10]


# Runs.


def flags_of(data, student, *words):
    return ["--data", data, "--student", student, *words]


def test_a_run_is_resumed_to_equal_bits_and_ends_on_the_grid(
    prepared_folder, teacher, tmp_path, monkeypatch
):
    flags = flags_of(prepared_folder, teacher, "--bits", 2, "--alpha", 0.5)
    record = check_resume(quantize, flags, tmp_path, monkeypatch)
    out, whole = weights(tmp_path / "whole"), load_model(teacher)
    before, rounded = whole.state_dict(), load_model(teacher)
    rounded.load_state_dict(quantized_weights(whole, 2), strict=False)
    for name, weight in out.items():
        on_grid = weight.ndim == 2 and ".layers." in name
        assert not on_grid or all(len(row.unique()) <= 4 for row in weight), name
        assert not torch.equal(weight, before[name]), f"{name} did not learn"
    levels = [(out[name].sign() != w.sign()).any() for name, w in rounded.state_dict().items()]
    assert any(levels), "no weight crossed to another level: the full weights did not learn"
    ids, _ = PackedText(prepared_folder, "train", 32).batch(0, 4, 0)
    assert torch.equal(load_quantized(tmp_path / "whole")(ids), load_model(tmp_path / "whole")(ids))
    # The first step's KL is that of the model whole and rounded; with shared layers it would be 0.
    expected = kl_divergence(rounded(ids), whole(ids), 1.0).mean().item()
    (first, _), *_ = logged(tmp_path / "whole", "kl", "step")
    assert float(first) == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    assert record["metrics"]["kl"] > 0


def test_16_bits_are_the_plain_method(prepared_folder, teacher, tmp_path):
    flags = [*SIX, *flags_of(prepared_folder, teacher), "--alpha", 0.5, "--steps", 3]
    run(quantize, *flags, "--bits", 16, "--out", tmp_path / "ours")
    run(train_distillation, *flags, "--teacher", teacher, "--out", tmp_path / "plain")
    assert same_bits(tmp_path / "ours", tmp_path / "plain")


def test_rounding_alone_costs_no_step(prepared_folder, teacher, tmp_path):
    flags = [*SIX[2:], *flags_of(prepared_folder, teacher, "--bits", 2, "--embeddings")]
    record = run(quantize, *flags, "--rounded_only", "--flops", 1e9, "--out", tmp_path)
    assert (record["steps"], record["tokens"], record["flops"]) == (0, 0, 0)
    expected, out = quantized_weights(load_model(teacher), 2, True), weights(tmp_path)
    assert all(torch.equal(out[name], weight) for name, weight in expected.items())
    metrics = record["metrics"]
    assert metrics["val_loss"] > metrics["teacher_loss"] and metrics["kl"] > 0.01


def test_another_teacher_micro_batches_and_compile(prepared_folder, teacher, tmp_path, monkeypatch):
    """--compile reaches the teacher, the rounded copy, and the student that learns."""
    compiled, other = [], tmp_path / "other"
    save_model(make_or_load("nano", 400), other, prepared_folder)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))
    words = ("--teacher", other, "--temperature", 2, "--steps", 2, "--compile")
    flags = flags_of(prepared_folder, teacher, *words)
    for parts in (1, 2):
        cut = ("--accumulation_steps", parts)
        record = run(quantize, *SIX, *flags, *cut, "--out", tmp_path / str(parts))
    assert nearly_equal(tmp_path / "1", tmp_path / "2")
    assert record["made_from"].keys() >= {str(other / "model.safetensors")}
    assert len(compiled) == 2 * 3


@pytest.mark.parametrize(
    "words, message",
    [(["--bits", 12], "--bits 12 has no grid"), (["--fsdp"], "--fsdp cuts the rows")],
)
def test_what_cannot_be_is_refused(words, message, prepared_folder, teacher, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(quantize, *SIX, *flags_of(prepared_folder, teacher), *words, "--out", tmp_path / "x")
    assert not (tmp_path / "x" / "run.json").exists()
