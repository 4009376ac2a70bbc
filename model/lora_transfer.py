"""An adapter that was trained for one model, given to another one.

    copied       A' = A           B' = B             where both have one base, or nearly
    projected    A' = A P_in      B' = P_out B       otherwise; P_in x ~ z, P_out v ~ y

x and y are what the target's base is given at a layer and what it answers, z and v what the
source's base is and does at the counterpart, on the same tokens; both P are fitted by least
squares. (Of gate_proj and up_proj, y and v are what down_proj is given instead: their own answers
lie in a space no wider than their input, so they tell too little.) Loading the matrices of a large
model into a small one has no meaning otherwise: they are written in its own coordinates.
(Cross-LoRA, 2508.05232, aligns singular vectors of the weights instead, without any data.)

Shapes: B batch, S sequence, N = B * S tokens, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import ALL_LINEAR, LoRALinear, lora_layers


def copy_lora(source: nn.Module, target: nn.Module, input_ids: Tensor | None = None) -> None:
    """Give `target` the adapter of `source`: right where both have the same base, or where one base
    is a descendant of the other. No tokens are needed. Raises ValueError where shapes differ."""
    layers, others = lora_layers(target), lora_layers(source)
    shapes = [{name: x.weight.shape for name, x in some.items()} for some in (layers, others)]
    if shapes[0] != shapes[1]:
        cure = "an adapter is a change of one base's own coordinates: project it, or train one"
        raise ValueError(f"the two models differ in the shapes of their adapted layers: {cure}")
    for name, layer in layers.items():
        give(layer, others[name], others[name].lora_A.weight, others[name].lora_B.weight)


@torch.no_grad()
def give(layer: LoRALinear, other: LoRALinear, A: Tensor, B: Tensor) -> None:
    """A (r, in) and B (out, r) for `layer`, at the alpha / r that `other` has them at."""
    if A.shape != layer.lora_A.weight.shape:
        ranks = f"an adapter of rank {len(A)} does not fit one of rank {len(layer.lora_A.weight)}"
        raise ValueError(f"{ranks}: use --rank {len(A)}")
    layer.lora_A.weight.copy_(A)
    layer.lora_B.weight.copy_(B * (other.scale / layer.scale))


@torch.no_grad()
def inputs_of(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """What each linear layer is given, (N, in), by the base alone, without any adapter."""
    seen = {}

    def note(layer, x, name):
        seen[name] = x[0].flatten(0, -2).double()
        return F.linear(x[0], layer.weight, layer.bias)  # replaces what the layer says

    hooks = [
        layer.register_forward_hook(lambda m, x, _, name=name: note(m, x, name))
        for name, layer in model.named_modules()
        if name.split(".")[-1] in ALL_LINEAR
    ]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def outputs_of(name: str, layer: LoRALinear, inputs: dict[str, Tensor]) -> Tensor:
    """What `layer` answers, (N, out), in the coordinates of its output."""
    if name.endswith(("gate_proj", "up_proj")):
        return inputs[f"{name.rpartition('.')[0]}.down_proj"]
    return inputs[name] @ layer.weight.T.double()


def least_squares(x: Tensor, y: Tensor, ridge: float = 1e-6) -> Tensor:
    """The P (a, b) with x P nearest to y: x (N, a), y (N, b). A little ridge, a share of the mean
    square of x, keeps directions out that the tokens hardly use."""
    square = x.T @ x
    square.diagonal().add_(ridge * square.diagonal().mean())
    return torch.linalg.solve(square, x.T @ y)


@torch.no_grad()
def project_lora(source: nn.Module, target: nn.Module, input_ids: Tensor) -> None:
    """Give `target` the adapter of `source`, a model of other width or depth, projected by what
    both bases make of input_ids (B, S). A layer's counterpart is at the same share of the depth.
    Raises ValueError where the two were not adapted at the same kinds of layers, with one rank."""
    own, other = inputs_of(target, input_ids), inputs_of(source, input_ids)
    layers, others = lora_layers(target), lora_layers(source)
    depths = [model.config.num_hidden_layers for model in (target, source)]
    for name, layer in layers.items():
        start, number, end = name.split(".", 3)[1:]  # model.layers.NUMBER.self_attn.q_proj
        match = f"model.{start}.{-(-(int(number) + 1) * depths[1] // depths[0]) - 1}.{end}"
        if match not in others:
            raise ValueError(f"the source has no adapter at {match}: use the same targets for both")
        given = others[match]
        into = least_squares(own[name], other[match])  # (in, in of the source)
        out = least_squares(outputs_of(match, given, other), outputs_of(name, layer, own))
        A = given.lora_A.weight.double() @ into.T
        give(layer, given, A, out.T @ given.lora_B.weight.double())


TRANSPLANTS = {"copy": copy_lora, "project": project_lora}
