"""Quantisation by hand: weights on a grid of 2^b levels, one grid for each output channel.

    level = clip( round(w / s), -2^(b-1), 2^(b-1) - 1 )        w^ = s * level        d w^ / d w = 1

s is a step per row, symmetric about 0: of eight that clip none to many of the row's largest
weights, the one of least squared error. Rounding has slope 0 almost everywhere, so its gradient is
taken to be 1 (straight through, Bengio et al. 2013, 1308.3432), but 0 for a weight that was
clipped: to move it would change nothing. A grid for a whole matrix would follow its largest row.

    quantized.safetensors    of a matrix NAME: its levels, and s as NAME.scale; all else in float32
                             levels take 8, 4 or 2 bits, one, two or four a byte; 3 bits take 4

Quantised are the matrices of all layers. Embedding, head and norms stay in floating point, unless
`embeddings` is true (norms always do). Activations are not quantised. Shapes: (rows, columns) of a
weight, rows its output channels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from files import atomic_path

from .checkpoint import read_config
from .transformer import Transformer

FILE = "quantized.safetensors"
FULL = 16  # bits at which nothing is rounded


def limits(bits: int) -> tuple[int, int]:
    """The lowest and highest level."""
    if not 2 <= bits <= 8:
        raise ValueError(f"--bits {bits} has no grid here: use 2 to 8, or {FULL} to round nothing")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def width_of(bits: int) -> int:
    """Bits of a level on disk."""
    return next(width for width in (2, 4, 8) if width >= bits)


@torch.no_grad()
def channel_scale(weight: Tensor, bits: int) -> Tensor:
    """The step s of each row, (rows, 1), for weight (rows, columns): the largest weight on the
    highest level, or down to 0.3 of that where clipping costs less than it gains."""
    low, high = limits(bits)
    whole = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / high
    scale, least = whole, torch.full_like(whole, torch.inf)
    for share in torch.linspace(1.0, 0.3, 8).tolist():
        levels = (weight / (share * whole)).round().clamp(low, high)
        error = (share * whole * levels - weight).square().sum(1, keepdim=True)
        scale = torch.where(error < least, share * whole, scale)
        least = torch.minimum(error, least)
    return scale


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """weight (rows, columns) on the grid of its rows, in its own dtype; straight-through gradients
    that are 0 outside the clip. 16 bits: the weight itself."""
    if bits == FULL:
        return weight
    (low, high), scale = limits(bits), channel_scale(weight, bits)
    levels = (weight.detach() / scale).round()
    inside = (levels >= low) & (levels <= high)
    through = torch.where(inside, weight - weight.detach(), 0.0)  # 0 in value, 1 in gradient
    return levels.clamp(low, high) * scale + through


def is_quantized(name: str, weight: Tensor, embeddings: bool) -> bool:
    return weight.ndim == 2 and (embeddings or ".layers." in name)


def quantized_weights(model: nn.Module, bits: int, embeddings: bool = False) -> dict[str, Tensor]:
    """All weights of `model` by name (a tied one once), on their grids where they are quantised.
    torch.func.functional_call runs `model` with them: no module is changed, so no teacher can come
    to share it."""
    return {
        name: fake_quantize(w, bits) if is_quantized(name, w, embeddings) else w
        for name, w in model.named_parameters()
    }


def pack(levels: Tensor, width: int) -> Tensor:
    """levels (rows, columns), integers in two's complement of `width` bits -> (rows, bytes): 8 /
    width of them in a byte, the first in the lowest bits. int8 where width is 8, else uint8."""
    each = 8 // width
    parts = F.pad(levels.int(), (0, -levels.shape[1] % each)) % 2**width  # -1 is 15 in 4 bits
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    packed = (parts.unflatten(1, (-1, each)) << shifts).sum(-1).to(torch.uint8)
    return packed.view(torch.int8) if width == 8 else packed


def unpack(packed: Tensor, width: int, columns: int) -> Tensor:
    """The levels (rows, columns), int32, that `pack` was given."""
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    parts = ((packed.int()[..., None] >> shifts) % 2**width).flatten(1)[:, :columns]
    return torch.where(parts >= 2 ** (width - 1), parts - 2**width, parts)


@torch.no_grad()
def save_quantized(model: Transformer, folder, bits: int, embeddings: bool = False) -> int:
    """Write FILE into `folder`, for the config.json that is there; returns its size in bytes.
    model: with the weights that learn, not the rounded ones."""
    tensors = {}
    for name, weight in model.named_parameters():  # a tied one comes once
        weight = tensors[name] = weight.detach().float().cpu().contiguous()
        if bits != FULL and is_quantized(name, weight, embeddings):
            scale = tensors[f"{name}.scale"] = channel_scale(weight, bits)
            tensors[name] = pack((weight / scale).round().clamp(*limits(bits)), width_of(bits))
    with atomic_path(path := Path(folder) / FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "bits": str(bits)})
    return path.stat().st_size


def load_quantized(folder, device="cpu") -> Transformer:
    """The model of `folder`/quantized.safetensors, its weights s * level in float32, in evaluation
    mode. Raises ValueError where the file is missing, damaged, or of another model."""
    path, model = Path(folder) / FILE, Transformer(read_config(folder))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    try:
        with safe_open(path, "pt") as file:
            bits = int(file.metadata()["bits"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in [name for name in state if f"{name}.scale" in state]:
            levels = unpack(state[name], width_of(bits), shapes[name][1])
            state[name] = levels * state.pop(f"{name}.scale")
        if model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({reason}): quantise the model again") from None
    return model.to(device).eval()
