"""A smaller model cut out of a larger one: which layers, channels, heads and units it keeps.

The residual stream is one space: whatever reads it or writes it must keep the same channels.

    reads     q, k, v, gate, up, head      columns
    writes    embedding, o, down           columns of the embedding, rows of o and down
    scales    all 2L + 1 norms

Heads and feed-forward units are a layer's own: each layer keeps others. A unit is a row of gate and
up and a column of down; a query head d rows of q and d columns of o; a key-value head d rows of k
and of v, and it takes only query heads along that looked at it (grouped queries).

Layers alone may be left out too (`take_layers`): DistilBERT's start (1910.01108), "layers:N" here.
Ranking after Minitron (Muralidharan et al. 2024, 2407.14679): by the mean size of activations.
Shapes: B batch, S sequence, D width, H heads, K key-value heads, d head width, L layers, I units.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .config import MOST_LAYERS, PRESETS, ModelConfig
from .transformer import Transformer

LAYERS = "layers:"
CUT = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def smaller_shape(large: ModelConfig, preset: str, layers: int, whole: bool) -> ModelConfig:
    """`large` with the number of layers and the sizes of a preset; layers: instead of the preset's,
    if not 0; whole: only layers are left out, as where `preset` is "layers:N". Raises ValueError
    where there is no such preset."""
    if (few := layers_named(preset)) is not None:
        return replace(large, num_hidden_layers=few)
    if preset not in PRESETS:
        cure = f"use one of {', '.join(PRESETS)}"
        raise ValueError(f"--student {preset} is no preset, whose shape is needed: {cure}")
    small = ModelConfig.preset(preset, large.vocab_size)
    sizes = {} if whole else {name: getattr(small, name) for name in CUT}
    return replace(large, **sizes, num_hidden_layers=layers or small.num_hidden_layers)


def even_layers(kept: int, layers: int) -> list[int]:
    """`kept` of `layers` indices, evenly spaced from the first to the last; one is the first."""
    if not 1 <= kept <= layers:
        raise ValueError(f"{kept} layers cannot be copied from {layers}: use 1 to {layers}")
    return [round(i * (layers - 1) / max(1, kept - 1)) for i in range(kept)]


def layers_named(name) -> int | None:
    """N of a student called "layers:N", else None. Raises ValueError where N is no number."""
    if not str(name).startswith(LAYERS):
        return None
    number = str(name).removeprefix(LAYERS)
    if not number.isascii() or not number.isdigit() or not 1 <= int(number[:9]) <= MOST_LAYERS:
        raise ValueError(f"--student {name}: write layers:N, N from 1 to the teacher's number")
    return int(number)


def take_layers(model: Transformer, count: int) -> Transformer:
    """`model` with `count` of its layers, evenly spaced, and all else; changed in place."""
    layers = model.model.layers
    kept = even_layers(count, len(layers))
    model.model.layers = nn.ModuleList(layers[number] for number in kept)
    model.config = model.model.config = replace(model.config, num_hidden_layers=count)
    return model


@torch.no_grad()
def importance(model: Transformer, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean size of what `batches` of input_ids (B, S) make: "channels" (D,), |x| after the norms,
    over all of them; "heads" (L, H), the norm of each head's output; "units" (L, I), |x|."""
    config, layers = model.config, model.model.layers
    found = {
        "channels": torch.zeros(config.hidden_size),
        "heads": torch.zeros(len(layers), config.num_attention_heads),
        "units": torch.zeros(len(layers), config.intermediate_size),
    }

    def add(sums: Tensor, x: Tensor) -> None:  # x (B, S, n): a size of each of n things
        sums += x.float().mean((0, 1)).to(sums.device)

    def of_norm(norm, inputs, output):
        add(found["channels"], output.abs())

    hooks = [model.model.norm.register_forward_hook(of_norm)]
    for number, layer in enumerate(layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(of_norm))

        def of_heads(module, inputs, number=number):
            heads = inputs[0].unflatten(-1, (-1, config.head_dim))  # (B, S, H * d) -> (B, S, H, d)
            add(found["heads"][number], heads.float().norm(dim=-1))

        def of_units(module, inputs, number=number):
            add(found["units"][number], inputs[0].abs())

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(of_heads))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(of_units))
    for input_ids in batches:
        model.model.forward(input_ids)
    for hook in hooks:
        hook.remove()
    return found


def largest(values: Tensor, n: int) -> Tensor:
    """Indices (n,) of the n largest of `values` (m,), ascending."""
    return values.topk(n).indices.sort().values


def largest_heads(values: Tensor, H: int, K: int, groups: int) -> tuple[Tensor, Tensor]:
    """H query heads (H,) and their K key-value heads (K,): of `values` (all heads,), which look at
    `groups` key-value heads, the groups whose H / K best heads are best, and those heads."""
    grouped = values.view(groups, -1)  # consecutive heads share a key-value head
    best = grouped.topk(H // K).indices.sort().values  # (groups, H / K)
    kept = largest(grouped.gather(1, best).sum(1), K)
    return (best[kept] + kept[:, None] * grouped.shape[1]).flatten(), kept


def check_fits(small: ModelConfig, large: ModelConfig) -> None:
    """Raise ValueError where `small` has more of something than `large`, or another head width."""
    pairs = [
        (f"{name} = {getattr(small, name)}", getattr(small, name), getattr(large, name))
        for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size")
    ]
    own, shared = (c.num_attention_heads // c.num_key_value_heads for c in (small, large))
    for what, mine, theirs in [*pairs, (f"{own} heads a key-value head", own, shared)]:
        if mine > theirs:
            more = f"the student's {what} is more than the teacher's {theirs}"
            raise ValueError(f"{more}: what is copied can only shrink, take a smaller preset")


def prune(
    model: Transformer, config: ModelConfig, layers: list[int], ranks: dict[str, Tensor]
) -> Transformer:
    """A new model of shape `config` with the weights of `model`'s `layers`, and of the things that
    `ranks` (`importance`) puts highest. Raises ValueError where `config` is larger."""
    check_fits(config, model.config)
    d, old, new = config.head_dim, model.state_dict(), {}
    channels = largest(ranks["channels"], config.hidden_size)
    whole = torch.arange(d)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new[name] = old[name][:, channels]
    new["model.norm.weight"] = old["model.norm.weight"][channels]
    for target, source in enumerate(layers):
        groups = model.config.num_key_value_heads
        H, K = config.num_attention_heads, config.num_key_value_heads
        heads, shared = largest_heads(ranks["heads"][source], H, K, groups)
        units = largest(ranks["units"][source], config.intermediate_size)
        queries, keys = ((i[:, None] * d + torch.arange(d)).flatten() for i in (heads, shared))
        kept = {  # part of a parameter's name: rows, columns
            "layernorm": (channels, None), "q_norm": (whole, None), "k_norm": (whole, None),
            "q_proj": (queries, channels), "k_proj": (keys, channels), "v_proj": (keys, channels),
            "o_proj": (channels, queries), "gate_proj": (units, channels),
            "up_proj": (units, channels), "down_proj": (channels, units),
        }  # fmt: skip
        prefix = f"model.layers.{source}."
        for name in (name for name in old if name.startswith(prefix)):
            rows, columns = next(where for part, where in kept.items() if part in name)
            value = old[name][rows]  # biases have no columns
            value = value[:, columns] if value.ndim == 2 else value
            new[name.replace(prefix, f"model.layers.{target}.")] = value
    small = Transformer(config)
    small.load_state_dict(new)
    return small
