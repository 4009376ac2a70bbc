"""The Transformer computes what its docstring says: every part, and the whole in its Llama, Qwen2
and Qwen3 forms, against a slow float64 implementation that shares no line with it (explicit loops,
rotations as complex numbers); its sizes, names and initial weights are those that are promised."""

import cmath
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import PRESETS, ModelConfig, Record, Transformer, transformer
from model.config import Llama3Scaling
from model.transformer import (
    Attention,
    RMSNorm,
    SwiGLU,
    apply_rotary,
    attend,
    attention_by_formula,
    rotary_frequencies,
    rotary_tables,
)

TINY = ModelConfig(
    vocab_size=13, hidden_size=12, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, intermediate_size=10, max_position_embeddings=32,
    rope_theta=50.0, rms_norm_eps=1e-3,
)  # fmt: skip
VARIANTS = {
    "llama": TINY,
    "untied": replace(TINY, tie_word_embeddings=False),
    "all heads have keys": replace(TINY, num_key_value_heads=4),
    "one head has keys": replace(TINY, num_key_value_heads=1),
    "qwen2": replace(TINY, attention_bias=True),
    "qwen3": replace(TINY, qk_norm=True, tie_word_embeddings=False),
}
IDS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 12, 0]]


def random_model(config, seed=0):
    """Every parameter is drawn wide, biases and norms too, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            start = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(start + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


# The slow implementation: lists of floats, one token at a time.


def matvec(weight, x):
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]


def slow_norm(x, scale, eps):
    size = math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v / size * g for v, g in zip(x, scale, strict=True)]


def slow_rotate(x, position, theta):
    """Pair (i, i + d/2) is a complex number; turn it by position * theta^(-2i/d)."""
    half = len(x) // 2
    turned = [
        complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-2 * i / len(x)))
        for i in range(half)
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


def slow_softmax(scores):
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def split_heads(x, head_dim):
    return [x[i : i + head_dim] for i in range(0, len(x), head_dim)]


def slow_attention(xs, weights, prefix, config):
    """xs: S lists of D floats, normalised already -> S lists of D."""

    def project(name, x):
        out = matvec(weights[f"{prefix}{name}.weight"], x)
        if config.attention_bias:
            out = [a + b for a, b in zip(out, weights[f"{prefix}{name}.bias"], strict=True)]
        return split_heads(out, config.head_dim)

    queries, keys, values = [], [], []
    for position, x in enumerate(xs):
        query, key = project("q_proj", x), project("k_proj", x)
        if config.qk_norm:
            query, key = (
                [slow_norm(h, weights[f"{prefix}{name}.weight"], config.rms_norm_eps) for h in part]
                for name, part in (("q_norm", query), ("k_norm", key))
            )
        queries.append([slow_rotate(head, position, config.rope_theta) for head in query])
        keys.append([slow_rotate(head, position, config.rope_theta) for head in key])
        values.append(project("v_proj", x))
    outputs = []
    for s in range(len(xs)):
        mixed = []
        for head in range(config.num_attention_heads):
            shared = head * config.num_key_value_heads // config.num_attention_heads
            scores = [
                sum(a * b for a, b in zip(queries[s][head], keys[t][shared], strict=True))
                / math.sqrt(config.head_dim)
                for t in range(s + 1)
            ]
            shares = slow_softmax(scores)
            mixed += [
                sum(share * values[t][shared][i] for t, share in enumerate(shares))
                for i in range(config.head_dim)
            ]
        outputs.append(matvec(weights[f"{prefix}o_proj.weight"], mixed))
    return outputs


def slow_swiglu(x, gate, up, down):
    gated = [
        g / (1 + math.exp(-g)) * u for g, u in zip(matvec(gate, x), matvec(up, x), strict=True)
    ]
    return matvec(down, gated)


def slow_transformer(weights, ids, config):
    """Logits of one row of ids: S lists of V floats."""
    xs = [weights["model.embed_tokens.weight"][index] for index in ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        scale = weights[f"{at}input_layernorm.weight"]
        normed = [slow_norm(x, scale, config.rms_norm_eps) for x in xs]
        added = slow_attention(normed, weights, f"{at}self_attn.", config)
        xs = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, added, strict=True)]
        scale = weights[f"{at}post_attention_layernorm.weight"]
        mlp = [weights[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        added = [slow_swiglu(slow_norm(x, scale, config.rms_norm_eps), *mlp) for x in xs]
        xs = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, added, strict=True)]
    normed = [slow_norm(x, weights["model.norm.weight"], config.rms_norm_eps) for x in xs]
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return [matvec(weights[head], x) for x in normed]


def as_lists(module):
    return {name: tensor.double().tolist() for name, tensor in module.state_dict().items()}


def assert_close(got, expected, tolerance=2e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)


# The parts.


def test_rms_norm():
    norm = RMSNorm(6, eps=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6) - 2.0)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = [[slow_norm(v, norm.weight.tolist(), 0.1) for v in row] for row in x.tolist()]
    assert_close(norm(x), expected)
    assert_close(norm(x), F.rms_norm(x.double(), (6,), norm.weight.double(), 0.1))


def test_rms_norm_is_computed_in_float32():
    """In float16 the squares overflow, and every output would be 0."""
    norm = RMSNorm(4, eps=1e-5).half()
    x = torch.tensor([[300.0, -300.0, 600.0, 0.0]])
    out = norm(x.half())
    assert out.dtype == torch.float16
    assert_close(out, F.rms_norm(x.double(), (4,)), 1e-3)


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rotary_is_a_complex_rotation_of_pairs(theta):
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))  # (B, heads, S, d)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 30, 500, 1000]])
    got = apply_rotary(x, *rotary_tables(positions, 8, theta))
    expected = [
        [
            [slow_rotate(x[b, h, s].tolist(), int(positions[b, s]), theta) for s in range(5)]
            for h in range(3)
        ]
        for b in range(2)
    ]
    assert_close(got, expected, 2e-4)  # the angle 1000 itself is rounded in float32


def test_the_scaled_rotation_of_llama_3():
    """Three ranges, worked out as Meta's code branches on wavelengths, in float64: pairs that turn
    more than 4 times within 8,192 positions stay, those that turn less than once are 8 times
    slower."""
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    expected, ranges = [], set()
    for i in range(32):
        frequency = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            ranges.add("kept")
        elif wavelength > 8192 / 1:
            ranges.add("slowed")
            frequency = frequency / 8
        else:
            ranges.add("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency)
    assert ranges == {"kept", "slowed", "between"}
    assert_close(rotary_frequencies(64, 500000.0, scaling), expected, 1e-7)
    cos, sin = rotary_tables(torch.tensor([[3]]), 64, 500000.0, scaling)
    assert_close(cos[0, 0, 0, :32], [math.cos(3 * x) for x in expected], 1e-6)
    assert_close(sin[0, 0, 0, 32:], [math.sin(3 * x) for x in expected], 1e-6)


def test_the_model_uses_its_scaling():
    scaled = replace(TINY, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16))
    models = [random_model(config).eval() for config in (TINY, scaled)]
    plain, turned = (model(torch.tensor(IDS)) for model in models)
    assert torch.equal(plain[:, 0], turned[:, 0])  # position 0 is not turned
    assert (plain[:, 1:] - turned[:, 1:]).abs().max() > 1e-3


def test_rotary_scores_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def score(query_at, key_at):
        tables = (rotary_tables(torch.tensor([[at]]), 8, 100.0) for at in (query_at, key_at))
        turned = [apply_rotary(x, *t) for x, t in zip((query, key), tables, strict=True)]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_swiglu():
    torch.manual_seed(0)
    layer = SwiGLU(TINY)
    weights = as_lists(layer)
    x = torch.randn(1, 3, 12)
    mlp = [weights[f"{name}_proj.weight"] for name in ("gate", "up", "down")]
    assert_close(layer(x), [[slow_swiglu(v, *mlp) for v in x[0].tolist()]])


@pytest.mark.parametrize("name", VARIANTS)
def test_attention(name):
    config = VARIANTS[name]
    torch.manual_seed(0)
    layer = Attention(config)
    x = torch.randn(2, 6, config.hidden_size)
    rotary = rotary_tables(torch.arange(6)[None], config.head_dim, config.rope_theta)
    weights = as_lists(layer)
    assert_close(layer(x, rotary), [slow_attention(row, weights, "", config) for row in x.tolist()])


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_transformer(name):
    config = VARIANTS[name]
    model = random_model(config)
    weights = as_lists(model)
    expected = [slow_transformer(weights, ids, config) for ids in IDS]
    logits = model(torch.tensor(IDS))
    assert logits.shape == (2, 7, 13)
    assert_close(logits, expected, 2e-4)


# What must and must not change a logit.


def test_causality():
    """A token changes the logits at its own position and after it, never before."""
    model = random_model(TINY)
    ids = torch.tensor(IDS)
    before = model(ids)
    for at in range(7):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % 13
        after = model(changed)
        torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-5)
        difference = (after[:, at:] - before[:, at:]).abs().amax(-1)
        assert difference.min() > 1e-3


def test_right_padding_does_not_reach_a_logit():
    model = random_model(TINY)
    padded = F.pad(torch.tensor(IDS), (0, 6))
    torch.testing.assert_close(model(padded)[:, :7], model(torch.tensor(IDS)), rtol=0, atol=1e-5)


def test_positions_count_from_anywhere():
    """Rotary attention knows distances only: shifting all positions changes nothing."""
    model = random_model(TINY)
    ids, positions = torch.tensor(IDS), torch.arange(7)[None]
    shifted = model(ids, positions + 11)
    torch.testing.assert_close(shifted, model(ids), rtol=1e-4, atol=1e-4)
    stretched = model(ids, 2 * positions)
    assert (stretched - shifted).abs().max() > 1e-2


# What a forward pass leaves behind on request.


def last_tokens_mask(S, keys):
    """(1, 1, S, keys): causal, and nobody looks at the first token but itself."""
    mask = torch.ones(S, keys, dtype=torch.bool).tril(keys - S)
    mask[1:, 0] = False
    return mask[None, None]


def slow_maps(query, key, mask):
    """softmax(q k / sqrt(d)) of one layer: (B, H, S, d) and (B, K, S, d) -> (B, H, S, S)."""
    maps = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for b, h, s in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        shared = key[b, h * key.shape[1] // query.shape[1]].double()
        scores = shared @ query[b, h, s].double() / math.sqrt(query.shape[-1])
        seen = [t for t in range(key.shape[2]) if mask[0, 0, s, t]]
        maps[b, h, s, seen] = torch.tensor(slow_softmax(scores[seen].tolist()), dtype=maps.dtype)
    return maps


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_recorded_attention_is_the_softmax_of_the_recorded_scores(name, masked):
    """And mixing the recorded values by it is what scaled_dot_product_attention gives."""
    config = VARIANTS[name]
    model, record, ids = random_model(config), Record(), torch.tensor(IDS)
    mask = last_tokens_mask(7, 7) if masked else None
    model(ids, mask=mask, record=record)
    L, H, K, d = 2, 4, config.num_key_value_heads, 6
    for name in ("attention", "queries", "keys", "values"):
        assert len(getattr(record, name)) == L
    for layer in range(L):
        query, key = record.queries[layer], record.keys[layer]
        maps, value = record.attention[layer], record.values[layer]
        assert query.shape == (2, H, 7, d) and key.shape == value.shape == (2, K, 7, d)
        causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
        assert_close(maps, slow_maps(query, key, causal if mask is None else mask), 1e-5)
        mixed = maps @ value.repeat_interleave(H // K, dim=1)
        kernel = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        torch.testing.assert_close(mixed, kernel, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_recorded_hidden_states_lead_from_the_embedding_to_the_logits():
    model, record = random_model(TINY), Record("hidden")
    logits = model(torch.tensor(IDS), record=record)
    assert [tuple(x.shape) for x in record.hidden] == [(2, 7, 12)] * 3  # L + 1
    assert torch.equal(record.hidden[0], model.model.embed_tokens(torch.tensor(IDS)))
    rotary = rotary_tables(torch.arange(7)[None], 6, TINY.rope_theta)
    for layer, before, after in zip(
        model.model.layers, record.hidden, record.hidden[1:], strict=False
    ):
        assert torch.equal(layer(before, rotary), after)
    assert torch.equal(model.lm_head(model.model.norm(record.hidden[-1])), logits)
    assert record.logits is logits
    assert record.attention == record.queries == record.keys == record.values == []


@pytest.mark.parametrize("wanted", [(), ("attention",), ("hidden", "values")])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_record_changes_neither_logits_nor_gradients(name, wanted):
    model, ids = random_model(VARIANTS[name]), torch.tensor(IDS)
    record, found = Record(*wanted), []
    for kept in (None, record):
        logits = model(ids, record=kept)
        loss = logits.logsumexp(-1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found.append((logits, *gradients))
    for plain, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-5, atol=1e-5)
    if "attention" in record.wanted:  # a method's loss on the maps reaches the weights
        weight = model.model.layers[0].self_attn.q_proj.weight
        grad = torch.autograd.grad(record.attention[0].pow(2).sum(), weight)[0]
        assert grad.abs().sum() > 0


def test_an_empty_record_asks_for_all_and_an_unknown_name_is_refused():
    assert Record().wanted == {"hidden", "attention", "queries", "keys", "values"}
    assert Record("keys", "hidden").wanted == {"keys", "hidden"}
    with pytest.raises(ValueError, match="no record of 'attentions': use hidden, attention,"):
        Record("hidden", "attentions")


@pytest.mark.parametrize("wanted, written_out", [(("hidden", "keys"), 0), (("attention",), 2)])
def test_the_kernel_is_used_unless_attention_is_asked_for(monkeypatch, wanted, written_out):
    calls = {"formula": 0, "kernel": 0}

    def count(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    formula = count("formula", attention_by_formula)
    monkeypatch.setattr(transformer, "attention_by_formula", formula)
    monkeypatch.setattr(transformer, "attend", count("kernel", attend))
    random_model(TINY)(torch.tensor(IDS), record=Record(*wanted))
    assert calls == {"formula": written_out, "kernel": 2 - written_out}


# Names, sizes, first weights.

EMBEDDING = {"model.embed_tokens.weight": (13, 12), "model.norm.weight": (12,)}
HEAD = {"lm_head.weight": (13, 12)}
LAYER = {
    "input_layernorm.weight": (12,),
    "self_attn.q_proj.weight": (24, 12),
    "self_attn.k_proj.weight": (12, 12),
    "self_attn.v_proj.weight": (12, 12),
    "self_attn.o_proj.weight": (12, 24),
    "post_attention_layernorm.weight": (12,),
    "mlp.gate_proj.weight": (10, 12),
    "mlp.up_proj.weight": (10, 12),
    "mlp.down_proj.weight": (12, 10),
}
BIASES = {f"self_attn.{x}_proj.bias": (width,) for x, width in (("q", 24), ("k", 12), ("v", 12))}
HEAD_NORMS = {"self_attn.q_norm.weight": (6,), "self_attn.k_norm.weight": (6,)}


@pytest.mark.parametrize(
    "name, layer", [("llama", LAYER), ("qwen2", LAYER | BIASES), ("qwen3", LAYER | HEAD_NORMS)]
)
def test_parameter_names_and_shapes_are_hugging_face_names(name, layer):
    config = replace(VARIANTS[name], num_hidden_layers=1)
    expected = EMBEDDING | HEAD | {f"model.layers.0.{key}": size for key, size in layer.items()}
    model = Transformer(config)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected
    stored = set(expected) - (set(HEAD) if config.tie_word_embeddings else set())
    assert {key for key, _ in model.named_parameters()} == stored


def test_a_tied_head_is_the_embedding():
    model = Transformer(TINY)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(torch.tensor([[1, 2]])).sum().backward()
    unused = model.model.embed_tokens.weight.grad[7]  # read by the head alone
    assert unused.abs().sum() > 0
    untied = Transformer(replace(TINY, tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() == model.num_parameters() + 13 * 12


@pytest.mark.parametrize(
    "name, vocab_size, millions",
    [
        ("nano", 2048, 0.2),
        ("micro", 2048, 0.5),
        ("mini", 2048, 1.0),
        ("midi", 2048, 2.4),
        ("small", 2048, 5.0),
        ("base", 6400, 26),
        ("large", 6400, 104),
    ],
)
def test_presets_have_the_promised_size(name, vocab_size, millions):
    with torch.device("meta"):  # sizes only
        model = Transformer(ModelConfig.preset(name, vocab_size))
    count = model.num_parameters()
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions < 10 else 0.5)
    width, layers, heads, shared, intermediate, _ = PRESETS[name]
    attention = 2 * width * width * (1 + shared / heads)  # q and o; k and v are narrower
    layer = attention + 3 * width * intermediate + 2 * width
    assert count == vocab_size * width + layers * layer + width


def test_initial_weights():
    """Normal with deviation 0.02; what writes into the residual stream 0.02 / sqrt(2L)."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=500, hidden_size=96, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, head_dim=24, intermediate_size=128, attention_bias=True,
    )  # fmt: skip
    for name, parameter in Transformer(config).named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            residual = "o_proj" in name or "down_proj" in name
            expected = 0.02 / 4 if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_the_residual_stream_does_not_grow_with_depth():
    """Unscaled, what the layers add together would have 16 times the variance at 16 layers."""
    sizes = []
    for layers in (1, 16):
        torch.manual_seed(0)
        config = replace(ModelConfig.preset("nano", 200), num_hidden_layers=layers)
        body = Transformer(config).model
        x = body.embed_tokens(torch.arange(200).view(4, 50))
        out = x
        rotary = rotary_tables(torch.arange(50)[None], config.head_dim, config.rope_theta)
        for layer in body.layers:
            out = layer(out, rotary)
        sizes.append((out - x).detach().std().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)


def test_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", 512))
    ids = torch.randint(512, (4, 32))
    loss = F.cross_entropy(model(ids).flatten(0, 1), torch.randint(512, (4 * 32,)))
    assert loss.item() == pytest.approx(math.log(512), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_model_overfits_one_batch(name):
    """Random tokens can only be learned by heart, and only if every gradient flows."""
    torch.manual_seed(0)
    config = replace(
        VARIANTS[name], vocab_size=29, hidden_size=32, intermediate_size=64, head_dim=8
    )
    model = Transformer(config)
    tokens = torch.randint(29, (2, 13))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert loss.item() < 0.05


# Configurations that cannot work.


@pytest.mark.parametrize(
    "change, named",
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"head_dim": 5}, "head_dim = 5"),
        ({"attention_bias": True, "qk_norm": True}, "qk_norm"),
    ],
)
def test_sizes_that_cannot_work_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        replace(TINY, **change)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no model preset or checkpoint folder 'huge'.*nano"):
        ModelConfig.preset("huge", 2048)


def test_attention_learns_in_float32_under_bfloat16():
    """Its gradients are those of float32, not of the kernel's slow bfloat16 backward pass."""
    generator = torch.Generator().manual_seed(0)
    low = [torch.randn(2, 2, 5, 4, generator=generator).bfloat16() for _ in range(3)]
    wide = [tensor.float().requires_grad_() for tensor in low]
    low = [tensor.requires_grad_() for tensor in low]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attend(*low, mask=None)
    exact = F.scaled_dot_product_attention(*wide, is_causal=True)
    assert torch.equal(mixed, exact)
    for ours, theirs in zip(
        torch.autograd.grad(mixed.sum(), low), torch.autograd.grad(exact.sum(), wide), strict=True
    ):
        assert torch.equal(ours, theirs.bfloat16())


def mixed_by_formula(*inputs):
    return attention_by_formula(*inputs)[1]


@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize("form", [attend, mixed_by_formula])
def test_shared_key_value_heads(form, K):
    """As if every key-value head were copied for its H / K queries: value and gradients."""
    query = torch.randn(2, 6, 9, 8, requires_grad=True)
    key, value = (torch.randn(2, K, 9, 8, requires_grad=True) for _ in range(2))
    copies = [x.repeat_interleave(6 // K, dim=1) for x in (key, value)]
    expected = F.scaled_dot_product_attention(query, *copies, is_causal=True)
    found = form(query, key, value, None)
    torch.testing.assert_close(found, expected)
    upstream, inputs = torch.randn(2, 6, 9, 8), (query, key, value)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("S, written_out", [(12, True), (20, False)])
def test_compiled_training_in_bfloat16_takes_the_faster_attention(monkeypatch, S, written_out):
    """The formula for short sequences, the kernel for long ones; the loss is that of float32."""
    calls = []

    def spy(query, key, value, mask):
        calls.append(query.shape)
        return attention_by_formula(query, key, value, mask)

    monkeypatch.setattr(transformer, "SHORT", 16)
    monkeypatch.setattr(transformer, "attention_by_formula", spy)
    model = Transformer(ModelConfig.preset("nano", 64))
    ids = torch.randint(64, (2, S))
    exact = model(ids).logsumexp(-1).mean()
    exact.backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.compile(model, backend="aot_eager")(ids).float().logsumexp(-1).mean()
    loss.backward()
    assert bool(calls) == written_out
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    found = model.model.layers[0].self_attn.q_proj.weight.grad
    assert (found - expected).norm() < 0.1 * expected.norm()
