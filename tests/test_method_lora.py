"""LoRA: the layer by hand, merging, PEFT's folder, an adapter given to another model, and runs."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train_distillation
from distill import cross_entropy
from files import file_hash, read_json
from methods import lora
from methods.lora import compute_loss
from model import ModelConfig, Transformer, load_model
from model.lora import (
    ALL_LINEAR,
    ATTENTION,
    LoRALinear,
    add_lora,
    load_adapted,
    load_lora,
    lora_layers,
    merge_lora,
    merged_weights,
    save_lora,
)
from model.lora_transfer import copy_lora, least_squares, project_lora
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, check_resume, nearly_equal, run, same_bits, weights

IDS = torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(9))
SHAPES = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
SHAPES |= {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}  # (out, in)


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(50, 16, 2, 2, 1, 8, 24, **options))


def trained(model, rank=4, alpha=8.0, targets=ALL_LINEAR):
    """`model` with an adapter whose B is not 0 any more."""
    add_lora(model, rank, alpha, targets)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_random_teacher(tmp_path_factory.mktemp("lora"), prepared_folder)


# The layer.


def layer_by_hand(alpha=6.0):
    base = nn.Linear(2, 2, bias=False)
    layer = LoRALinear(base, 2, alpha)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        layer.lora_A.weight.copy_(torch.tensor([[1.0, -1], [0, 1]]))
        layer.lora_B.weight.copy_(torch.tensor([[2.0, 0], [0, 1]]))
    return layer


def test_a_layer_by_hand():
    """x = (1, 2): W x = (5, 11), A x = (-1, 2), B A x = (-2, 2), and alpha / r = 6 / 2 = 3."""
    layer = layer_by_hand()
    found = layer(torch.tensor([1.0, 2.0]))
    assert found.tolist() != [3.0, 13.0], "alpha / r is missing"
    assert found.tolist() != [-7.0, 23.0], "alpha is not divided by r"
    assert found.tolist() == [5 - 3 * 2, 11 + 3 * 2]
    # B A = ((2, -2), (0, 1))
    assert layer.merged().tolist() == [[1 + 3 * 2, 2 - 3 * 2], [3.0, 4 + 3 * 1]]


def test_gradients_are_those_of_the_whole_matrix_seen_through_a_and_b():
    """dA = s B^T G and dB = s G A^T, where G is the gradient of W + s B A; and gradcheck."""
    layer, x = layer_by_hand().double(), torch.randn(5, 2, dtype=torch.float64)
    whole = layer.merged().detach().requires_grad_()
    (x @ whole.T).square().sum().backward()
    layer(x).square().sum().backward()
    G, A, B = whole.grad, layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(A.grad, 3 * B.detach().T @ G)
    torch.testing.assert_close(B.grad, 3 * G @ A.detach().T)

    def forward(A, B):
        parts = {"lora_A.weight": A, "lora_B.weight": B}
        return torch.func.functional_call(layer, parts, (x,))

    assert torch.autograd.gradcheck(forward, (A.detach().requires_grad_(), B.requires_grad_()))


def test_at_first_nothing_changes_and_only_a_and_b_learn():
    model = small_model(attention_bias=True)
    before = model(IDS).detach()
    adapter = add_lora(model, 4, 8.0)
    assert torch.equal(model(IDS), before)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{n}.lora_{x}.weight" for n in lora_layers(model) for x in "AB"}
    assert len(lora_layers(model)) == 2 * 7 and len(learning) == 2 * 2 * 7
    assert {id(p) for p in adapter.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    cross_entropy(model(IDS), IDS).mean().backward()
    for layer in lora_layers(model).values():
        assert layer.weight.grad is None, "the base has a gradient"
        assert layer.lora_B.weight.grad.any() and not layer.lora_A.weight.grad.any()


def test_an_adapter_of_zeros_never_learns():
    """The mutant that sets A to 0 too: both gradients are 0 and stay so."""
    model = small_model()
    add_lora(model, 4, 8.0)
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_A.weight)
    cross_entropy(model(IDS), IDS).mean().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"tie_word_embeddings": False}])
def test_merging_keeps_the_logits_and_the_names(options):
    model, names = trained(small_model(**options)), set(small_model(**options).state_dict())
    before, base = model(IDS).detach(), small_model(**options)
    assert (before - base(IDS)).abs().max() > 0.01, "the adapter does nothing: a weak test"
    merged = merge_lora(model)
    torch.testing.assert_close(merged(IDS), before, rtol=0, atol=1e-5)
    assert set(merged.state_dict()) == names and not lora_layers(merged)


def test_a_merge_that_loses_alpha_over_r_is_told_apart():
    """The best known mistake: W + B A."""
    model, mutant = trained(small_model()), small_model()
    before = model(IDS).detach()
    lost = {
        f"{name}.weight": x.weight + x.lora_B.weight @ x.lora_A.weight
        for name, x in lora_layers(model).items()
    }
    mutant.load_state_dict(lost, strict=False)
    assert (mutant(IDS) - before).abs().max() > 1e-3
    mutant.load_state_dict(merged_weights(model), strict=False)
    torch.testing.assert_close(mutant(IDS), before, rtol=0, atol=1e-5)


def test_at_rank_of_the_width_it_can_be_the_plain_method():
    """With A = I and alpha = r, B is the change of W: Adam takes both models the same way."""
    plain, model = small_model(), small_model()
    add_lora(model, 16, 16.0, ATTENTION)
    for layer in lora_layers(model).values():
        nn.init.eye_(layer.lora_A.weight).requires_grad_(False)
    plain.requires_grad_(False)
    for name in lora_layers(model):
        plain.get_parameter(f"{name}.weight").requires_grad_()
    for one in (plain, model):
        learning = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=0.01, eps=1e-4)
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(one(IDS), IDS).mean().backward()
            optimizer.step()
    assert (plain(IDS) - small_model()(IDS)).abs().max() > 0.01
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "rank, targets, message",
    [
        (0, ALL_LINEAR, "rank 0"),
        (17, ALL_LINEAR, "rank 17: use 1 to 16"),
        (4, ["c_attn"], "c_attn"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(rank, targets, message):
    with pytest.raises(ValueError, match=message):
        add_lora(small_model(), rank, 8.0, targets)


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(trained(small_model()), 4, 8.0)


# PEFT's folder.


def test_the_folder_is_as_peft_documents_it(tmp_path):
    """huggingface.co/docs/peft/developer_guides/checkpoint: names, shapes, and the fields."""
    model = trained(small_model(), rank=4, alpha=8.0)
    save_lora(model, tmp_path, "out/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {}
    for number in range(2):
        for name, (rows, columns) in SHAPES.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            path = f"base_model.model.model.layers.{number}.{block}.{name}"
            expected[f"{path}.lora_A.weight"] = (4, columns)
            expected[f"{path}.lora_B.weight"] = (rows, 4)
    assert {name: tuple(x.shape) for name, x in tensors.items()} == expected
    about = read_json(tmp_path / "adapter_config.json")
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8.0}
    wanted |= {"base_model_name_or_path": "out/base", "bias": "none", "fan_in_fan_out": False}
    wanted |= {"lora_dropout": 0.0, "target_modules": sorted(SHAPES), "inference_mode": True}
    assert wanted.items() <= about.items()
    assert not about["use_rslora"], "PEFT would scale by alpha / sqrt(r)"


def test_what_is_saved_loads_to_equal_logits(tmp_path):
    model = trained(small_model(), alpha=3.0, targets=("q_proj", "down_proj"))
    save_lora(model, tmp_path, "x")
    other = small_model()
    load_lora(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    save_lora(small_model(), tmp_path, "x")  # without an adapter: an earlier one would be wrong
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_rslora": True}, "use_rslora = True"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"]}, "is of no layer here"),
        ({"target_modules": [*ALL_LINEAR, "lm_head"]}, "no lora_A of lm_head"),
        ({"r": 5}, "no lora_A of .*q_proj"),
        ({"r": "4"}, "'r' is '4'"),
    ],
)
def test_an_adapter_that_is_something_else_is_refused(change, message, tmp_path):
    save_lora(trained(small_model()), tmp_path, "x")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(ValueError, match=message):
        load_lora(small_model(), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError):
        load_lora(small_model(), tmp_path)


# An adapter for another model.


def in_other_coordinates(model):
    """The same function, its hidden channels and the neurons of its layers in another order."""
    order, neurons = (torch.randperm(n, generator=torch.manual_seed(3)) for n in (16, 24))
    state = {}
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            weight = weight[order]
        elif name.endswith("down_proj.weight"):
            weight = weight[order][:, neurons]
        elif name.endswith("o_proj.weight"):
            weight = weight[order]
        else:
            weight = weight[:, order]
        state[name] = weight[neurons] if "gate_proj" in name or "up_proj" in name else weight
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


def apart(model, other) -> float:
    """How far two models are from each other in their logits."""
    return (model(IDS) - other(IDS)).norm().item()


def lively_model(seed=0):
    """Weights large enough for every layer to matter."""
    model = small_model(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def test_an_adapter_is_copied_to_a_model_of_the_same_base():
    base = lively_model()
    source, target = trained(copy.deepcopy(base)), trained(copy.deepcopy(base), alpha=2.0)
    copy_lora(source, target)
    assert apart(source, target) < 1e-5, "alpha / r of the two was not settled"
    wider = trained(Transformer(ModelConfig(50, 24, 2, 2, 1, 8, 24)))
    with pytest.raises(ValueError, match="differ in the shapes"):
        copy_lora(source, wider)


def test_a_projected_adapter_does_what_it_did_where_a_copied_one_does_not():
    """To a model that is the same function in other coordinates: the popular advice to load an
    adapter because the shapes fit fails, P finds the coordinates."""
    base = lively_model()
    source, other = trained(copy.deepcopy(base)), in_other_coordinates(base)
    assert apart(base, other) < 1e-4
    changed = apart(source, base)
    copied, projected = (trained(copy.deepcopy(other)) for _ in range(2))
    copy_lora(source, copied)
    project_lora(source, projected, IDS)
    assert apart(source, copied) > 0.5 * changed
    assert apart(source, projected) < 0.1 * changed, apart(source, projected) / changed


@pytest.mark.parametrize("layers, matches", [(4, (0, 0, 1, 1)), (1, (1,)), (3, (0, 1, 1))])
def test_a_projection_fits_other_widths_and_depths(layers, matches):
    """B' A' is P_out B A P_in of the layer at the same share of the depth."""
    source = trained(lively_model())
    torch.manual_seed(1)
    target = Transformer(ModelConfig(50, 24, layers, 2, 2, 10, 32))
    add_lora(target, 4, 8.0)
    project_lora(source, target, IDS)
    own, others = lora_layers(target), lora_layers(source)
    for number, match in enumerate(matches):
        down = own[f"model.layers.{number}.mlp.down_proj"]
        B = others[f"model.layers.{match}.mlp.down_proj"].lora_B.weight  # (16, r)
        P = torch.linalg.lstsq(B.T, down.lora_B.weight.T).solution  # exists: 16 > r
        torch.testing.assert_close(B.T @ P, down.lora_B.weight.T, rtol=0, atol=1e-4)
        for one in set(range(2)) - {match}:
            assert not torch.allclose(others[f"model.layers.{one}.mlp.down_proj"].lora_B.weight, B)
    assert all(x.lora_A.weight.isfinite().all() for x in own.values())
    few = add_lora(small_model(), 2, 8.0) and small_model()
    add_lora(few, 2, 8.0)
    with pytest.raises(ValueError, match="use --rank 4"):
        project_lora(source, few, IDS)


def test_least_squares_is_numpy_s_and_survives_a_dead_channel():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 6, generator=generator, dtype=torch.float64)
    expected = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(least_squares(x, y), expected, rtol=0, atol=1e-3)
    x[:, 2] = 0.0
    assert least_squares(x, y).isfinite().all() and not least_squares(x, y)[2].any()


# The loss.


@pytest.mark.parametrize("alpha", (0.0, 0.3, 1.0))
def test_the_loss_is_lesson_2_s(alpha):
    generator = torch.Generator().manual_seed(4)
    student, teacher = 2 * torch.randn(2, 2, 5, 30, generator=generator, dtype=torch.float64)
    labels = torch.randint(30, (2, 5), generator=generator)
    labels[0, 3:], teacher[0, 0, 3] = -100, -torch.inf
    expected = train_distillation.compute_loss(
        student.requires_grad_(), teacher, labels, 1.0, alpha
    )
    found = compute_loss(student, teacher, labels, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, student)[0] for loss, _ in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


# Runs.


def test_a_chain_is_resumed_to_equal_bits_and_its_base_is_frozen(
    prepared_folder, teacher, tmp_path, monkeypatch
):
    """The teacher learns (one step), its adapter is projected, and the student is killed in its
    fifth step."""
    flags = ["--data", prepared_folder, "--teacher", teacher, "--student", teacher, "--rank", 4]
    flags += ["--teacher_steps", 1, "--transplant", "project", "--lora_alpha", 12]
    before = file_hash(teacher / "model.safetensors")
    record = check_resume(lora, flags, tmp_path, monkeypatch, update=1 + 5)
    whole = tmp_path / "whole"
    assert list(record["phases"]) == ["teacher", "last"]
    assert record["flops"] == sum(part["flops"] for part in record["phases"].values())
    assert file_hash(teacher / "model.safetensors") == before
    for folder in (whole, whole / "phases" / "teacher"):
        adapted, merged, base = load_adapted(folder), weights(folder), weights(teacher)
        for name, weight in adapted.state_dict().items():
            if "lora_" not in name:
                assert torch.equal(weight, base[name]), f"{name} of the base changed"
        for name, weight in merged_weights(adapted).items():
            torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
            assert not torch.equal(merged[name], base.pop(name)), f"{name} did not learn"
        assert all(torch.equal(merged[name], weight) for name, weight in base.items())
    config = read_json(whole / "adapter" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (4, 12.0)


def test_the_word_problems_with_a_base_of_its_own(prepared_folder, teacher, tmp_path):
    """What the command does with no flag but folders: three phases, then one more without any."""
    flags = [*SIX, "--steps", 1, "--seq_len", 256, "--data", prepared_folder / "reason_train.jsonl"]
    flags += ["--tokenizer", prepared_folder, "--teacher", teacher, "--teacher_steps", 1]
    record = run(lora, *flags, "--out", tmp_path)
    assert list(record["phases"]) == ["base", "teacher", "last"]
    base = read_json(tmp_path / "phases" / "base" / "run.json")
    assert base["args"]["data"] == str(prepared_folder) and base["args"]["rank"] == 0
    assert not (tmp_path / "phases" / "base" / "adapter").exists()
    assert base["args"]["optimizer"] == "muon" and record["args"]["optimizer"] == "adamw"
    assert load_model(tmp_path).num_parameters() == base["parameters"]


def test_rank_0_is_the_plain_method(prepared_folder, teacher, tmp_path):
    flags = [*SIX, "--steps", 2, "--data", prepared_folder, "--teacher", teacher]
    flags += ["--student", teacher, "--alpha", 0.5]
    run(lora, *flags, "--rank", 0, "--teacher_steps", 0, "--out", tmp_path / "ours")
    run(train_distillation, *flags, "--out", tmp_path / "plain")
    assert same_bits(tmp_path / "ours", tmp_path / "plain")


def test_a_copied_adapter_starts_where_the_teacher_is_and_micro_batches_count_nothing(
    prepared_folder, teacher, tmp_path, monkeypatch, capsys
):
    """--compile reaches all models; a step of LoRA costs less than one of all weights."""
    compiled, records = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    flags = [*SIX, "--steps", 2, "--data", prepared_folder, "--teacher", teacher]
    flags += ["--student", teacher, "--transplant", "copy", "--teacher_steps", 2, "--compile"]
    for parts in (1, 2):
        cut = ("--accumulation_steps", parts)
        records.append(run(lora, *flags, *cut, "--out", tmp_path / str(parts)))
    assert nearly_equal(tmp_path / "1", tmp_path / "2")
    said = [line for line in capsys.readouterr().out.splitlines() if "before the first" in line]
    first, second = said[0].split("teacher ")[1].split(", student ")
    assert first == second, "a copied adapter is not where the teacher is"
    assert len(compiled) == 2 * (2 + 3)  # the phase: merged and adapted; then also the teacher
    flags = [*flags[:-5], "--rank", 0, "--teacher_steps", 0, "--alpha", 1]
    plain = run(lora, *flags, "--out", tmp_path / "plain")
    assert records[0]["phases"]["teacher"]["flops"] < 0.85 * plain["flops"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rank", 65], "rank 65: use 1 to 64"),
        (["--fsdp"], "--fsdp cuts the matrices"),
        (["--transplant", "copy"], "adapter_config.json does not exist"),
    ],
)
def test_what_cannot_be_is_refused(words, message, prepared_folder, teacher, tmp_path):
    flags = [*SIX, "--data", prepared_folder, "--teacher", teacher, "--student", teacher]
    with pytest.raises(ValueError, match=message):
        run(lora, *flags, "--teacher_steps", 0, *words, "--out", tmp_path / "x")
    assert not (tmp_path / "x" / "run.json").exists()
