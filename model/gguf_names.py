"""What GGUF, the file format of llama.cpp, calls the parts of a model, beside our names.

    token_embd.weight                   model.embed_tokens.weight
    blk.3.attn_q.weight                 model.layers.3.self_attn.q_proj.weight
    ...                                 (TOP and LAYER have them all)

llama.cpp rotates neighbours, the pairs (2i, 2i + 1), in a Llama; we rotate (i, i + d/2), as Hugging
Face does. So a Llama's rows of q and k stand in another order in a GGUF file. A Qwen's do not.
"""

import re

import torch
from torch import Tensor

KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3: no weight, but what slows its rotations down
IN_GGUF = {ours: theirs for theirs, ours in (TOP | LAYER).items()}


def our_name(name: str) -> str | None:
    """The name in our state_dict of GGUF's tensor `name`; None where we have no such tensor."""
    if not (parts := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)):
        return None
    layer, part, kind = parts.groups()
    if layer is None:
        return f"{TOP[part]}.{kind}" if part in TOP else None
    return f"model.layers.{layer}.{LAYER[part]}.{kind}" if part in LAYER else None


def gguf_name(name: str) -> str:
    """GGUF's name of our tensor `name`."""
    prefix, layer, part, kind = re.fullmatch(
        r"(model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name
    ).groups()
    return f"blk.{layer}.{IN_GGUF[part]}.{kind}" if prefix else f"{IN_GGUF[part]}.{kind}"


def rotary_order(heads: int, head_dim: int, to_gguf: bool = False) -> Tensor:
    """Of a Llama's q or k: which of GGUF's rows is our row i; to_gguf: which of ours is GGUF's.
    The rows of a head are (first halves, second halves) here, (first, second) of each pair there.
    """
    shape = (heads, 2, head_dim // 2) if to_gguf else (heads, head_dim // 2, 2)
    return torch.arange(heads * head_dim).view(shape).transpose(1, 2).flatten()
