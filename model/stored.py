"""A frozen model in fewer bytes: weights are kept in bfloat16 or int8, the computation is as ever.

    bfloat16   2 bytes a weight: 8 bits of its fraction are left
    int8       w^ = s * level, one step s for each output channel (model/quantize.py): 1 byte;
               x W^T is computed from the levels, which bfloat16 holds exactly, and then times s

A matrix is taken to the precision of the products when it is used, and forgotten again: that costs
time, and saves memory. Norms stay in float32; at int8 embedding and head are kept in bfloat16, for
each of their rows is a token. Shapes: x (..., columns) -> (..., rows).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantize import channel_scale, limits
from .transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class StoredLinear(nn.Module):
    """A nn.Linear whose weight (rows, columns) is kept in `dtype`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight, self.bias, self.scale = linear.weight, linear.bias, None
        if dtype == torch.int8:
            scale = channel_scale(weight.float(), bits=8)  # (rows, 1)
            weight = (weight.float() / scale).round().clamp(*limits(8))
            self.scale = frozen(scale.squeeze(1))
        self.weight = frozen(weight.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        out = F.linear(x, self.weight.to(dtype))
        if self.scale is not None:
            out = out * self.scale.to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class StoredEmbedding(nn.Module):
    """A nn.Embedding whose rows are kept in `dtype`, and come as float32."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype):
        super().__init__()
        self.weight = frozen(embedding.weight.to(dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight).float()


@torch.no_grad()
def store_weights(model: Transformer, dtype: str) -> Transformer:
    """Keep the matrices of `model`, which then cannot learn, in `dtype` of DTYPES, in place. Its
    parameters may come in any floating-point dtype."""
    model.requires_grad_(False)
    if dtype == "float32":
        return model.float()
    of_tokens = torch.bfloat16  # also at int8
    for layer in model.model.layers:
        for parent in list(layer.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, StoredLinear(module, DTYPES[dtype]))
    model.model.embed_tokens = StoredEmbedding(model.model.embed_tokens, of_tokens)
    model.lm_head = StoredLinear(model.lm_head, of_tokens)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for weight in model.parameters():
        if weight.ndim == 1:  # norms, biases, scales
            weight.data = weight.data.float()
    return model


def stored_bytes(model: nn.Module) -> int:
    """Memory of all weights; a tied one counts once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
