"""Sparse experts compute what Mixtral's equations say, are balanced by the right loss, come back
from a Mixtral folder to the bit, and can be made into one dense layer (model/align.py)."""

import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import (
    ExpertsConfig,
    ModelConfig,
    Transformer,
    add_experts,
    generate,
    load_model,
    read_config,
    save_model,
)
from model.align import align, assign, measure_shares, merge_experts, start_dense
from model.experts import RouterRecord, SparseExperts, active_parameters, balance_loss, route
from tests.explain import check
from tests.test_model import as_lists, matvec, slow_softmax, slow_swiglu

TINY = ExpertsConfig(
    vocab_size=13, hidden_size=12, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, intermediate_size=10, max_position_embeddings=32,
    rope_theta=50.0, rms_norm_eps=1e-3, num_local_experts=4, router_aux_loss_coef=0.02,
)  # fmt: skip
DENSE = ModelConfig(**{k: v for k, v in asdict(TINY).items() if k in ModelConfig().__dict__})
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 12, 0]])
ALL = torch.ones(2, 3, dtype=torch.bool)
LN = math.log


def random_model(config=TINY, seed=0):
    """Every parameter drawn wide, so that none can be forgotten."""
    torch.manual_seed(seed)
    dense = ModelConfig(**{k: v for k, v in asdict(config).items() if k in DENSE.__dict__})
    model = Transformer(dense)
    if isinstance(config, ExpertsConfig):
        add_experts(model, config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5 * torch.randn(weight.shape))
    return model


def set_expert(expert, w1, w3, w2):
    for name, value in (("w1", w1), ("w3", w3), ("w2", w2)):
        getattr(expert, name).weight.data.copy_(torch.as_tensor(value))


# The layer.


def one_number_layer(k=2):
    """D = I = 1, E = 3, for x = 1: gate logits ln 1, ln 3, ln 2; expert e gives silu(1) (e + 1)."""
    config = replace(TINY, hidden_size=1, intermediate_size=1, num_local_experts=3)
    layer = SparseExperts(replace(config, num_experts_per_tok=k)).double()
    layer.gate.weight.data = torch.tensor([[0.0], [LN(3)], [LN(2)]], dtype=torch.float64)
    for number, expert in enumerate(layer.experts):
        set_expert(expert, [[1.0]], [[number + 1.0]], [[1.0]])
    return layer


@pytest.mark.parametrize("k, expected", [
    (1, 2),  # the second expert alone, whatever its logit is
    (2, 3 / 5 * 2 + 2 / 5 * 3),  # experts 2 and 3, by 3 : 2
    (3, 1 / 6 * 1 + 3 / 6 * 2 + 2 / 6 * 3),
])  # fmt: skip
def test_a_token_worked_by_hand(k, expected):
    out = one_number_layer(k)(torch.ones(1, 1, 1, dtype=torch.float64)).item()
    silu = 1 / (1 + math.exp(-1))
    weights = [3 / 6, 2 / 6, 1 / 6]
    not_renormalised = sum(w * y for w, y in list(zip(weights, (2, 3, 1), strict=True))[:k])
    check(out, silu * expected, {
        "the softmax is over all experts, not over the chosen": silu * not_renormalised,
        "the chosen experts are added up without weights": silu * sum((2, 3, 1)[:k]),
    })  # fmt: skip


def test_the_layer_equals_explicit_loops():
    layer = random_model().model.layers[1].block_sparse_moe.double()
    x, weights = torch.randn(2, 3, 12, dtype=torch.float64), as_lists(layer)
    out = layer(x)
    for b, s in itertools.product(range(2), range(3)):
        token = x[b, s].tolist()
        logits = matvec(weights["gate.weight"], token)
        chosen = sorted(range(4), key=lambda e: -logits[e])[:2]
        shares = slow_softmax([logits[e] for e in chosen])
        expected = [0.0] * 12
        for share, e in zip(shares, chosen, strict=True):
            made = slow_swiglu(
                token, *(weights[f"experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
            )
            expected = [a + share * y for a, y in zip(expected, made, strict=True)]
        assert out[b, s].tolist() == pytest.approx(expected, rel=1e-10), f"token {b}, {s}"


def test_gradients_by_finite_differences():
    config = replace(TINY, hidden_size=3, intermediate_size=2)
    torch.manual_seed(0)
    layer, x = SparseExperts(config).double(), torch.randn(1, 4, 3, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: layer(x), (x.requires_grad_(),))
    torch.autograd.gradcheck(lambda *_: layer(x), tuple(layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_experts_are_one_dense_layer(k):
    """The limit case: whatever the gate says, the model is the plain Transformer."""
    dense = random_model(DENSE)
    sparse = random_model(replace(TINY, num_experts_per_tok=k))
    rest = {name: x for name, x in dense.state_dict().items() if ".mlp." not in name}
    sparse.load_state_dict(rest, strict=False)
    for layer, block in zip(sparse.model.layers, dense.model.layers, strict=True):
        for expert in layer.block_sparse_moe.experts:
            mlp = block.mlp
            set_expert(expert, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    torch.testing.assert_close(sparse(IDS), dense(IDS), rtol=1e-4, atol=1e-4)


def test_no_noise_and_no_capacity():
    """Training mode computes the same, twice; and a token's result does not hang on how many others
    chose its expert."""
    model = random_model()
    assert torch.equal(model.train()(IDS), model.eval()(IDS))
    layer = model.model.layers[0].block_sparse_moe
    x = torch.randn(1, 1, 12)
    crowd = layer(x.expand(1, 500, 12))
    torch.testing.assert_close(crowd, layer(x).expand(1, 500, 12))


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero():
    """Not none: several processes add up the same list of gradients."""
    layer = one_number_layer(k=1)
    layer(torch.ones(1, 1, 1, dtype=torch.float64)).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())
    assert layer.experts[0].w1.weight.grad.item() == 0 != layer.experts[1].w1.weight.grad.item()


def test_bfloat16_and_generation_run():
    model = random_model()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS)
    torch.testing.assert_close(logits.float(), model(IDS), rtol=0.2, atol=1.0)
    prompts = [[3, 1, 4], [6, 5]]
    with_cache = generate(model, prompts, 8, stop_ids=())
    assert with_cache == generate(model, prompts, 8, stop_ids=(), use_cache=False)


# The balance loss.


def logits_of(*probabilities):
    """A layer's router logits (1, N, E), one row of probabilities a token, shifted."""
    return torch.tensor([probabilities], dtype=torch.float64).log() + 2.0


def by_axis(router, k, mask):  # a peer's first version: f is 1 / E whatever happens (28093)
    probs = torch.stack([x[mask].softmax(-1) for x in router])
    f = F.one_hot(probs.topk(k).indices, probs.shape[-1]).double().mean(-1).mean()
    return probs.shape[-1] * (f * probs.mean(1)).sum(-1).mean()


def pooled(router, k, mask):  # transformers, issue 31464: one f and one P of all layers
    probs = torch.cat([x[mask] for x in router]).softmax(-1)
    f = F.one_hot(probs.topk(k).indices, probs.shape[-1]).double().mean(0)  # (k, E)
    return probs.shape[-1] * (f * probs.mean(0)).sum()


@pytest.mark.parametrize("rows, k, expected", [
    # f = (1, 0), P = (0.7, 0.3): 2 * 0.7
    ([(0.6, 0.4), (0.8, 0.2)], 1, 1.4),
    # f = (1/2, 1/2): 2 * (P_1 + P_2) / 2 = 1, the least
    ([(0.6, 0.4), (0.2, 0.8)], 1, 1.0),
    # k = 2 of 3: f = (1, 1/2, 1/2), P = (0.5, 0.25, 0.25): 3 * (0.5 + 0.125 + 0.125)
    ([(0.5, 0.4, 0.1), (0.5, 0.1, 0.4)], 2, 2.25),
    # all experts used: 3 * sum P = k = 3
    ([(0.5, 0.4, 0.1), (0.5, 0.1, 0.4)], 3, 3.0),
])  # fmt: skip
def test_balance_worked_by_hand(rows, k, expected):
    mask = torch.ones(1, 2, dtype=torch.bool)
    logits = logits_of(*rows)
    check(balance_loss([logits], k, mask), expected, {
        "f adds up to 1, not to k": expected / k, "E is missing": expected / len(rows[0]),
        "f is a mean over the wrong axis, a constant": by_axis([logits], k, mask).item(),
    }, rel=1e-9)  # fmt: skip
    check(pooled([logits], k, mask), expected, {}, rel=1e-9)  # of one layer transformers says this


def test_two_layers_that_each_use_one_expert_are_not_balanced():
    one, other = logits_of((0.99, 0.01), (0.99, 0.01)), logits_of((0.01, 0.99), (0.01, 0.99))
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = balance_loss([one, other], 1, mask).item()
    check(found, 2 * 0.99, {"the layers are pooled": pooled([one, other], 1, mask).item()}, 1e-9)
    assert pooled([one, other], 1, mask).item() == pytest.approx(1.0), "the mutant sees no fault"
    assert by_axis([one, other], 1, mask).item() == pytest.approx(1.0), "nor does this one"


def test_balance_has_gradients_and_a_mask_that_keeps():
    torch.manual_seed(0)
    router = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(lambda *router: balance_loss(list(router), 2, ALL), router)
    mask = ALL.clone()
    mask[1, 1:] = False
    before = balance_loss(router, 2, mask)
    with torch.no_grad():
        router[0][1, 1:], router[1][1, 2] = torch.nan, torch.inf
    after = balance_loss(router, 2, mask)
    assert after == before, "a token that does not count has changed the loss"
    gradients = torch.autograd.grad(after, router)
    assert all(x.isfinite().all() and not x[1, 1:].any() for x in gradients), "or its gradient"


def test_descending_the_balance_loss_balances():
    """Toy evidence: a gate that sends all to two of four experts learns to use all."""
    torch.manual_seed(0)
    x, gate = torch.randn(1, 256, 8), torch.nn.Linear(8, 4)
    gate.bias.data = torch.tensor([2.0, 2.0, 0.0, 0.0])
    mask = torch.ones(1, 256, dtype=torch.bool)
    first = balance_loss([gate(x)], 2, mask).item()
    for _ in range(60):
        gradients = torch.autograd.grad(balance_loss([gate(x)], 2, mask), gate.parameters())
        for weight, gradient in zip(gate.parameters(), gradients, strict=True):
            weight.data -= 0.5 * gradient
    used = route(gate(x), 2)[0].flatten().bincount(minlength=4) / 512
    assert first > 2.5 and balance_loss([gate(x)], 2, mask) < 2.1
    assert used.min() > 0.15, f"shares of the choices: {used.tolist()}"


# Folders.


def test_a_folder_comes_back_to_the_bit_as_mixtral(tmp_path):
    model = random_model()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config == read_config(tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"] and config["model_type"] == "mixtral"
    expected = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
    expected |= {"sliding_window": None, "router_jitter_noise": 0.0, "hidden_act": "silu"}
    assert expected.items() <= config.items() and not {"qk_norm", "attention_bias"} & config.keys()
    names = {"gate.weight"} | {f"experts.{e}.w{n}.weight" for e in range(4) for n in (1, 2, 3)}
    moe = {n for n in loaded.state_dict() if "block_sparse_moe" in n}
    of_layers = {f"model.layers.{i}.block_sparse_moe.{n}" for i in range(2) for n in names}
    assert moe == of_layers and not any(".mlp." in name for name in loaded.state_dict())


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (folder / "manifest.json").unlink()  # which would notice


@pytest.mark.parametrize("values, message", [
    ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
    ({"num_experts_per_tok": 5}, "5 experts per token of 4"),
    ({"num_local_experts": 0}, "num_local_experts = 0 must be a positive integer"),
    ({"num_local_experts": 5}, "Missing key"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ({"architectures": ["DeepseekV3ForCausalLM"]}, "or MixtralForCausalLM"),
])  # fmt: skip
def test_another_folder_is_refused(tmp_path, values, message):
    save_model(random_model(), tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_defaults_are_those_of_transformers():
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    config = {key: 64 for key in keys} | {"num_attention_heads": 8, "head_dim": 8}
    read = ExpertsConfig.from_json(config | {"architectures": ["MixtralForCausalLM"]})
    assert (read.rope_theta, read.rms_norm_eps, read.num_key_value_heads) == (1e6, 1e-5, 8)
    assert (read.num_local_experts, read.num_experts_per_tok) == (8, 2)
    newer = ExpertsConfig.from_json(config | {"rope_parameters": {"rope_theta": 500.0}})
    assert newer.rope_theta == 500.0 and not newer.tie_word_embeddings
    with pytest.raises(ValueError, match="no attention_bias and no qk_norm"):
        replace(TINY, qk_norm=True)


def test_sizes_and_first_weights():
    """Of nano: what methods/experts_to_dense.py says of total and active parameters."""
    dense = Transformer(ModelConfig.preset("nano", 2048))
    assert dense.num_parameters() == 229_696
    model = add_experts(dense, ExpertsConfig(**asdict(dense.config), num_local_experts=4))
    assert (model.num_parameters(), active_parameters(model)) == (451_392, 303_936)
    layer = model.model.layers[0].block_sparse_moe
    assert layer.experts[1].w1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.experts[1].w2.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)


# From experts to one dense layer.


@pytest.mark.parametrize("seed", range(8))
def test_assign_is_the_best_of_all_permutations(seed):
    scores = np.random.default_rng(seed).normal(size=(6, 6)).round(1)  # rounded: some are equal
    found = assign(scores)
    assert sorted(found) == list(range(6)), "not one to one"
    best = max(sum(scores[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert sum(scores[i, found[i]] for i in range(6)) == pytest.approx(best, abs=1e-9)


def test_assign_is_not_greedy():
    scores = np.array([[10.0, 9.0], [9.0, 1.0]])  # the largest first: 10 + 1; best: 9 + 9
    assert assign(scores).tolist() == [1, 0]
    large = np.random.default_rng(0).normal(size=(60, 60))
    greedy, left = 0.0, large.copy()
    for _ in range(60):
        i, j = np.unravel_index(left.argmax(), left.shape)
        greedy, left[i], left[:, j] = greedy + left[i, j], -np.inf, -np.inf
    assert large[range(60), assign(large)].sum() > greedy


def units_of(expert):
    return torch.stack((expert.w1.weight, expert.w3.weight, expert.w2.weight.T)).detach()


def shuffled(expert, seed):
    """An expert that computes the same: other order, some pairs of signs turned."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=generator)
    sign = 1.0 - 2.0 * torch.randint(2, (10, 1), generator=generator)
    gate, up, down = units_of(expert)[:, order]
    return torch.stack((gate, sign * up, sign * down))


def compute(units, x):
    gate, up, down = units
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down


def test_align_undoes_an_order_and_signs():
    model = random_model()
    experts, x = model.model.layers[0].block_sparse_moe.experts, torch.randn(20, 12)
    first = units_of(experts[0])
    other = shuffled(experts[0], seed=1)
    torch.testing.assert_close(compute(other, x), compute(first, x))
    torch.testing.assert_close(align(other, first), first)
    assert torch.equal(align(first, first), first)
    second = units_of(experts[1])  # units with nothing in common are only reordered
    torch.testing.assert_close(compute(align(second, first), x), compute(second, x))


def test_only_the_aligned_average_of_shuffled_copies_is_the_expert():
    """Toy evidence: four experts that compute the same, in other orders and signs."""
    model = random_model()
    layer, x = model.model.layers[0].block_sparse_moe, torch.randn(2, 5, 12)
    for number, expert in enumerate(layer.experts):
        gate, up, down = shuffled(layer.experts[0], seed=number)
        set_expert(expert, gate, up, down.T)
    shares, mlp = torch.tensor([0.1, 0.4, 0.3, 0.2]), random_model(DENSE).model.layers[0].mlp
    error = {}
    for how in ("one", "average", "aligned"):
        mlp.load_state_dict(merge_experts(list(layer.experts), shares, how))
        error[how] = ((mlp(x) - layer(x)).norm() / layer(x).norm()).item()
    assert error["one"] < 1e-5 and error["aligned"] < 1e-5
    assert error["average"] > 0.5, f"the plain average should be near noise: {error}"


def test_merging_by_shares_worked_by_hand():
    layer = one_number_layer()
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = {"one": 2.0, "average": 0.2 * 1 + 0.5 * 2 + 0.3 * 3}
    for how, up in expected.items():
        made = merge_experts(list(layer.experts), shares, how)
        assert made["up_proj.weight"].item() == pytest.approx(up)
        assert made["gate_proj.weight"].item() == made["down_proj.weight"].item() == 1


def test_shares_are_mean_weights_of_the_tokens_that_count():
    model = random_model()
    labels = IDS.clone()
    labels[1, 2:] = -100
    record = RouterRecord()
    model(IDS, record=record)
    expected = np.zeros((2, 4))
    for layer, logits in enumerate(record.router):
        for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten(), strict=True):
            chosen = sorted(range(4), key=lambda e: -row[e])[:2]
            for e, share in zip(chosen, slow_softmax([row[e] for e in chosen]), strict=True):
                expected[layer, e] += share if label != -100 else 0
    found = measure_shares(model, [(IDS, labels)])
    np.testing.assert_allclose(found.numpy(), expected / 9, rtol=1e-4)
    twice = measure_shares(model, [(IDS[:1], labels[:1]), (IDS[1:], labels[1:])])
    torch.testing.assert_close(twice, found)  # batches of 7 and 2 tokens: by token, not by batch


def test_a_student_starts_from_its_teacher():
    teacher, shares = random_model(), torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    for how in ("rest", "one", "aligned"):
        student = random_model(DENSE, seed=1)
        before = {name: x.clone() for name, x in student.state_dict().items()}
        start_dense(student, teacher, how, shares)
        for name, x in student.state_dict().items():
            expected = before[name] if ".mlp." in name else teacher.state_dict()[name]
            if how == "rest" or ".mlp." not in name:
                assert torch.equal(x, expected), name
            elif how == "aligned":
                assert not torch.equal(x, expected), name
        if how == "one":
            experts = [x.block_sparse_moe.experts for x in teacher.model.layers]
            for layer, expert in zip(
                student.model.layers, (experts[0][0], experts[1][3]), strict=True
            ):
                assert torch.equal(layer.mlp.down_proj.weight, expert.w2.weight)


def test_a_start_that_cannot_be_is_refused():
    teacher, shares = random_model(), torch.full((2, 4), 0.25)
    other = Transformer(replace(DENSE, intermediate_size=11))
    with pytest.raises(ValueError, match="intermediate_size is 11 in the student and 10 in the"):
        start_dense(other, teacher, "one", shares)
    with pytest.raises(ValueError, match="student is a mixture of experts"):
        start_dense(random_model(seed=1), teacher, "one", shares)
    with pytest.raises(ValueError, match="teacher has no experts"):
        measure_shares(random_model(DENSE), [(IDS, IDS)])
