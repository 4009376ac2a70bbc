"""What GGUF, the file format of llama.cpp, calls the parts of a model, beside our names.

llama.cpp rotates neighbours, the pairs (2i, 2i + 1), in a Llama; we rotate (i, i + d/2), as Hugging
Face does. So a Llama's rows of q and k stand in another order in a GGUF file. A Qwen's do not.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NO_LIBRARY = "the gguf library is not installed: pip install -r requirements-real.txt"
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3: no weight, but what slows its rotations down


def gguf_library():
    """The module gguf. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(NO_LIBRARY) from None
    return gguf


def names_in_gguf(kind: str, names: Iterable[str], layers: int) -> dict[str, str]:
    """GGUF's name of each of our tensors, by the library's own table: blk.3.attn_q.weight for
    model.layers.3.self_attn.q_proj.weight. kind: of MODEL_TYPES."""
    gguf = gguf_library()
    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(architecture, layers)
    return {name: table.get_name(name, (".weight", ".bias")) for name in names}


def rotary_order(heads: int, head_dim: int, to_gguf: bool = False) -> Tensor:
    """Of a Llama's q or k: which of GGUF's rows is our row i; to_gguf: which of ours is GGUF's.
    The rows of a head are (first halves, second halves) here, (first, second) of each pair there.
    """
    shape = (heads, 2, head_dim // 2) if to_gguf else (heads, head_dim // 2, 2)
    return torch.arange(heads * head_dim).view(shape).transpose(1, 2).flatten()
