"""LoRA: a frozen weight matrix, and a small learned correction beside it.

    y = W x + (alpha / r) * B A x        A (r, in) random, B (out, r) zero: at first nothing changes

r (in + out) numbers learn instead of in * out (Hu et al. 2021, 2106.09685). Merging adds the
correction to W: the merged model is a plain one and costs nothing more.

    adapter_config.json          rank, alpha, targets: PEFT's fields, so PEFT opens the folder
    adapter_model.safetensors    A and B of each layer under PEFT's names, and nothing else

Embeddings, head and norms stay as they are: a token that the base never saw keeps its random row.
Shapes: ... batch dimensions, r rank, N tokens.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from files import atomic_path, read_json, write_json

from .checkpoint import load_model
from .transformer import Transformer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT wraps a model twice, and its names say so
# What PEFT can do beyond this file, and the value that means "not done".
PLAIN = {"peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False}
PLAIN |= {"fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}


class LoRALinear(nn.Module):
    """Stands in for the nn.Linear `base`, whose weight it shares and freezes."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.alpha, self.scale = alpha, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)  # only one of the two: at A = B = 0 no gradient flows

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> Tensor:
        """W + (alpha / r) B A, (out, in)."""
        return self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of `model` that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Iterable[str] = ALL_LINEAR
) -> nn.ModuleList:
    """Freeze `model` and put an adapter at each layer whose name ends in one of `targets`. Returns
    what learns, all A and B. Raises ValueError where none is found, or the rank cannot help."""
    targets = tuple(targets)
    found = [name for name, m in model.named_modules() if name.split(".")[-1] in targets]
    if not found or lora_layers(model):
        fault = "the model has an adapter already: merge that first" if lora_layers(model) else ""
        cure = f"no layer is called {' or '.join(targets)}: use some of {', '.join(ALL_LINEAR)}"
        raise ValueError(fault or cure)
    width = model.config.hidden_size
    if not 1 <= rank <= width:
        raise ValueError(f"an adapter of rank {rank}: use 1 to {width}, the width of the model")
    model.requires_grad_(False)
    for name in found:
        parent, _, last = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, alpha)
        setattr(model.get_submodule(parent), last, layer)
    layers = lora_layers(model).values()
    return nn.ModuleList(m for layer in layers for m in (layer.lora_A, layer.lora_B))


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights (out, in) that a plain model would need to compute the same, by name."""
    return {f"{name}.weight": layer.merged() for name, layer in lora_layers(model).items()}


def merge_lora(model: nn.Module) -> nn.Module:
    """Turn each adapted layer of `model` into a plain nn.Linear that computes the same."""
    weights = merged_weights(model)
    for name, layer in lora_layers(model).items():
        parent, _, last = name.rpartition(".")
        rows, columns = layer.weight.shape
        plain = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(weights[f"{name}.weight"]), layer.bias
        setattr(model.get_submodule(parent), last, plain)
    return model


def save_lora(model: nn.Module, folder, base: str) -> None:
    """Write the adapter of `model` to `folder` as PEFT does; base: the folder of its base. The two
    files that an earlier run left there go, where `model` has none."""
    layers, tensors = lora_layers(model), {}
    if not layers:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            Path(folder, name).unlink(missing_ok=True)
        return
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            tensor = getattr(layer, part).weight.detach().cpu().contiguous()
            tensors[f"{PREFIX}{name}.{part}.weight"] = tensor
    about = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    about |= {"r": layer.lora_A.out_features, "lora_alpha": layer.alpha}
    about |= {"lora_dropout": 0.0, "inference_mode": True}
    about["target_modules"] = sorted({name.split(".")[-1] for name in layers})
    with atomic_path(Path(folder) / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", PLAIN | about)


@torch.no_grad()
def load_lora(model: nn.Module, folder) -> nn.ModuleList:
    """`add_lora` with the adapter in `folder`. Raises ValueError where it asks for what this file
    does not compute, or is not of this model."""
    path, file = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    about = read_json(path, r=int, target_modules=list)
    for name, plain in PLAIN.items():
        if (found := about.get(name, plain) or plain) != plain:
            raise ValueError(f"{path}: {name} = {found!r} is not supported, only {plain!r}")
    alpha, targets = about.get("lora_alpha"), about["target_modules"]
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise ValueError(f"{path} is damaged ('lora_alpha' is {alpha!r}): save the adapter again")
    adapter = add_lora(model, about["r"], alpha, list(map(str, targets)))
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): save the adapter again") from None
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part).weight
            tensor = tensors.pop(f"{PREFIX}{name}.{part}.weight", None)
            if tensor is None or tensor.shape != weight.shape:
                raise ValueError(f"{file}: no {part} of {name} that fits: it is of another base")
            weight.copy_(tensor)
    if tensors:
        raise ValueError(f"{file}: {min(tensors)} is of no layer here: it is of another base")
    return adapter


def load_adapted(folder, device="cpu") -> Transformer:
    """The base that `folder`/adapter was trained on, with that adapter, not merged. Raises
    ValueError where `folder` has no adapter, or its base is no longer there."""
    about = read_json(Path(folder) / "adapter" / "adapter_config.json", base_model_name_or_path=str)
    model = load_model(about["base_model_name_or_path"])
    load_lora(model, Path(folder) / "adapter")
    return model.to(device)
