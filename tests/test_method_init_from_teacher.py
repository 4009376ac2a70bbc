"""A student cut out of its teacher (model/prune.py, methods/init_from_teacher.py): nothing is lost
where all is kept, what is dead in the teacher may go, and every matrix keeps the same channels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods import init_from_teacher
from methods.init_from_teacher import compute_loss, cut_out
from model import ModelConfig, Record, Transformer, load_model, save_model
from model.prune import even_layers, importance, largest_heads, prune
from model.transformer import rotary_tables
from tests.short_runs import check_resume, run, weights

SMALL = ModelConfig(50, 12, 2, 2, 1, 4, 10, rms_norm_eps=1e-12)  # V, D, L, H, K, d, I
LARGE = ModelConfig(50, 20, 3, 6, 2, 4, 16, rms_norm_eps=1e-12)
KINDS = [{}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"qk_norm": True}]


def noisy(config, seed=0) -> Transformer:
    """A model whose every parameter, norms and biases too, is random and large."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def tokens(seed=0, rows=3):
    return torch.randint(50, (rows, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "kept, layers, expected",
    [(2, 4, [0, 3]), (3, 4, [0, 2, 3]), (4, 4, [0, 1, 2, 3]), (1, 4, [0]), (3, 5, [0, 2, 4]),
     (6, 12, [0, 2, 4, 7, 9, 11])],
)  # fmt: skip
def test_layers_are_evenly_spaced_from_first_to_last(kept, layers, expected):
    assert even_layers(kept, layers) == expected


@pytest.mark.parametrize("kept", [0, 5])
def test_more_layers_than_there_are_is_refused(kept):
    with pytest.raises(ValueError, match=f"{kept} layers cannot be copied from 4: use 1 to 4"):
        even_layers(kept, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_at_full_width_are_the_teacher(kind):
    teacher = noisy(replace(LARGE, **kind))
    copy = prune(teacher, teacher.config, [0, 1, 2], importance(teacher, [tokens()]))
    assert torch.equal(copy(tokens(1)), teacher(tokens(1))), "a whole copy says something else"


def hide(small: Transformer, seed=0):
    """A larger model that computes what `small` does: its weights stand scattered among others that
    are read by no one or read only zeros. Returns it, its layers that count, and ranks."""
    config = replace(
        LARGE, tie_word_embeddings=small.config.tie_word_embeddings,
        attention_bias=small.config.attention_bias, qk_norm=small.config.qk_norm,
    )  # fmt: skip
    large, generator = noisy(config, seed=9), torch.Generator().manual_seed(seed)
    channels = torch.tensor([1, 2, 5, 6, 7, 10, 12, 13, 15, 17, 18, 19])
    units, heads = torch.tensor([0, 2, 3, 5, 7, 8, 11, 13, 14, 15]), [3, 5]
    d = small.config.head_dim
    rows = {"q": [h * d + i for h in heads for i in range(d)], "k": [d + i for i in range(d)]}
    rows = {name: torch.tensor(index) for name, index in rows.items()}
    shrink = (12 / 20) ** 0.5  # a norm over 20 channels, 8 of them 0, makes the others larger
    with torch.no_grad():
        a, b = small.model, large.model
        for mine, theirs in ((a.embed_tokens, b.embed_tokens), (small.lm_head, large.lm_head)):
            if mine is not small.lm_head or not small.config.tie_word_embeddings:
                if mine is not small.lm_head:
                    theirs.weight.zero_()
                theirs.weight[:, channels] = mine.weight
        b.norm.weight[channels] = a.norm.weight * shrink
        b.layers[1].self_attn.o_proj.weight.zero_()  # the middle layer adds nothing
        b.layers[1].mlp.down_proj.weight.zero_()
        for one, two in zip(a.layers, (b.layers[0], b.layers[2]), strict=True):
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(two, name).weight[channels] = getattr(one, name).weight * shrink
            for name in ("q_proj", "k_proj", "v_proj"):
                index = rows["q" if name == "q_proj" else "k"]
                mine, theirs = getattr(one.self_attn, name), getattr(two.self_attn, name)
                theirs.weight[index[:, None], channels] = mine.weight
                if mine.bias is not None:
                    theirs.bias[index] = mine.bias
            if small.config.qk_norm:
                two.self_attn.q_norm.weight.copy_(one.self_attn.q_norm.weight)
                two.self_attn.k_norm.weight.copy_(one.self_attn.k_norm.weight)
            o, down = two.self_attn.o_proj.weight, two.mlp.down_proj.weight
            o.zero_()
            down.zero_()
            o[channels[:, None], rows["q"]] = one.self_attn.o_proj.weight
            down[channels[:, None], units] = one.mlp.down_proj.weight
            two.mlp.gate_proj.weight[units[:, None], channels] = one.mlp.gate_proj.weight
            two.mlp.up_proj.weight[units[:, None], channels] = one.mlp.up_proj.weight

    def ranks(n, kept):  # of those that count all above the others, in no order
        values = torch.rand(n, generator=generator)
        values[torch.as_tensor(kept)] += 1
        return values

    found = {
        "channels": ranks(20, channels),
        "heads": torch.stack([ranks(6, heads) for _ in range(3)]),
        "units": torch.stack([ranks(16, units) for _ in range(3)]),
    }
    return large, [0, 2], found


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_hidden_in_a_large_one_is_cut_out_whole(kind):
    small = noisy(replace(SMALL, **kind), seed=3)
    large, layers, ranks = hide(small)
    expected = small(tokens())
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(large(tokens()), expected, **close)  # the test's own work
    found = prune(large, replace(small.config), layers, ranks)
    shrink = (12 / 20) ** 0.5
    with torch.no_grad():  # the norms see no zeros any more
        for name, parameter in found.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                parameter /= shrink
    torch.testing.assert_close(found(tokens()), expected, **close)

    # One matrix that keeps other channels than the rest, as peers' scripts have sliced them.
    broken = found.state_dict()
    down = large.model.layers[2].mlp.down_proj.weight[:12, :10]
    for name, old in (
        ("model.embed_tokens.weight", large.model.embed_tokens.weight[:, :12]),
        ("model.layers.1.mlp.down_proj.weight", down),
    ):
        mutant = Transformer(small.config)
        mutant.load_state_dict({**broken, name: old})
        if name.startswith("model.embed") and small.config.tie_word_embeddings:
            mutant.load_state_dict({**broken, name: old, "lm_head.weight": old})
        assert not torch.allclose(mutant(tokens()), expected, **close), f"{name}: not told apart"


def test_heads_are_kept_with_the_key_value_head_that_they_look_at():
    """Six heads, three key-value heads: {0, 1}, {2, 3}, {4, 5}."""
    values = torch.tensor([5.0, 0.0, 4.0, 4.5, 1.0, 2.0])
    heads, shared = largest_heads(values, 2, 1, 3)
    assert (heads.tolist(), shared.tolist()) == ([2, 3], [1])  # 8.5 beats 5 and 3
    assert values.topk(2).indices.sort().values.tolist() == [0, 3], "two groups, and one key head"
    heads, shared = largest_heads(values, 2, 2, 3)
    assert (heads.tolist(), shared.tolist()) == ([0, 3], [0, 1])
    assert largest_heads(values, 6, 3, 3)[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_importance_is_the_mean_size_of_activations():
    """Held against a forward pass that is written out."""
    model = noisy(LARGE, seed=5)
    batches = [tokens(1), tokens(2)]
    found = importance(model, batches)
    channels, heads, units = torch.zeros(20), torch.zeros(3, 6), torch.zeros(3, 16)
    with torch.no_grad():
        for input_ids in batches:
            record = Record("attention", "values")
            model(input_ids, record=record)
            rotary = rotary_tables(torch.arange(9)[None], 4, LARGE.rope_theta)
            x = model.model.embed_tokens(input_ids)
            for number, layer in enumerate(model.model.layers):
                normed = layer.input_layernorm(x)
                channels += normed.abs().mean((0, 1))
                values = record.values[number].repeat_interleave(3, dim=1)  # 6 heads share 2
                mixed = record.attention[number] @ values  # (B, H, S, d)
                heads[number] += mixed.pow(2).sum(-1).sqrt().mean((0, 2))
                x = x + layer.self_attn(normed, rotary)
                normed = layer.post_attention_layernorm(x)
                channels += normed.abs().mean((0, 1))
                inner = F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
                units[number] += inner.abs().mean((0, 1))
                x = x + layer.mlp(normed)
            channels += model.model.norm(x).abs().mean((0, 1))
    for name, expected in (("channels", channels), ("heads", heads), ("units", units)):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    again = importance(model, batches)  # no hook is left behind that would count twice
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_larger_student_is_refused():
    teacher = noisy(LARGE)
    ranks = importance(teacher, [tokens()])
    for change, said in (
        ({"hidden_size": 24}, "hidden_size = 24 is more than the teacher's 20"),
        ({"intermediate_size": 17}, "intermediate_size = 17 is more"),
        ({"num_attention_heads": 8}, "4 heads a key-value head is more than the teacher's 3"),
    ):
        with pytest.raises(ValueError, match=said):
            prune(teacher, replace(LARGE, **change), [0, 1, 2], ranks)


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[0, 3:] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_lesson_2(alpha):
    student, teacher, labels = random_case()
    valid = labels != -100
    p, log_q = teacher.softmax(-1)[valid], student.log_softmax(-1)[valid]
    kl = F.kl_div(log_q, p, reduction="sum") / 8  # torch's own; 8 labels count
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    teacher = None if alpha == 1 else teacher
    loss, parts = compute_loss(student, teacher, labels, alpha)
    assert loss.item() == pytest.approx((alpha * ce + (1 - alpha) * kl).item(), rel=1e-12)
    assert ("kl" in parts) == (alpha < 1), "labels alone need no teacher"
    assert torch.autograd.gradcheck(lambda x: compute_loss(x, teacher, labels, alpha)[0], student)


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "teacher"
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig(400, 72, 4, 4, 2, 16, 200)), folder, prepared_folder)
    return folder


def test_stopped_and_resumed_to_the_same_bits(prepared_folder, teacher, tmp_path, monkeypatch):
    flags = ["--data", prepared_folder, "--teacher", teacher, "--alpha", 1]
    record = check_resume(init_from_teacher, flags, tmp_path, monkeypatch)
    shape = ModelConfig(400, 64, 2, 2, 1, 16, 192)  # nano's, with the teacher's head width
    assert record["parameters"] == Transformer(shape).num_parameters()


def start(teacher, *flags) -> dict[str, torch.Tensor]:
    args = init_from_teacher.parse_args([str(flag) for flag in flags])
    return cut_out(args, load_model(teacher), [tokens()]).state_dict()


def test_flags_choose_the_start(teacher):
    whole = weights(teacher)
    embedding = whole["model.embed_tokens.weight"]
    columns = {tuple(column.tolist()) for column in embedding.T}
    copied, first = start(teacher), start(teacher, "--width", "first")
    for found in (copied, first):
        kept = [tuple(column.tolist()) for column in found["model.embed_tokens.weight"].T]
        assert len(set(kept)) == 64 and set(kept) <= columns, "not 64 columns of the teacher's"
    assert torch.equal(first["model.embed_tokens.weight"], embedding[:, :64])
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(first[name.format(1)], whole[name.format(3)][:192, :64])
    assert not torch.equal(copied["model.embed_tokens.weight"], embedding[:, :64])
    random = start(teacher, "--init", "random")["model.embed_tokens.weight"]
    assert random.shape == (400, 64)
    assert columns.isdisjoint(tuple(column.tolist()) for column in random.T)
    for flags in (("--width", "full", "--layers", 3), ("--student", "layers:3")):
        args = init_from_teacher.parse_args(list(map(str, flags)))
        assert cut_out(args, load_model(teacher), [tokens()]) == "layers:3"  # Run takes them


TINY = ["--steps", 1, "--batch_size", 2, "--seq_len", 32, "--device", "cpu"]


@pytest.mark.parametrize("flags, said", [
    (["--student", "out/none"], "--student out/none is no preset"),
    (["--student", "small", "--layers", 2], "hidden_size = 256 is more than the teacher's 72"),
    (["--layers", 5], "5 layers cannot be copied from 4"),
    (["--layers", -1], "--layers -1 must be between 0 and 1,000"),
])  # fmt: skip
def test_impossible_starts_are_one_sentence(flags, said, prepared_folder, teacher, tmp_path):
    flags = [*TINY, "--data", prepared_folder, "--teacher", teacher, *flags]
    with pytest.raises(ValueError, match=said):
        run(init_from_teacher, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
