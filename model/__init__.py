"""What learns: the Transformer, its presets, generation, and Hugging Face checkpoint folders."""

from .checkpoint import load_model, make_or_load, read_config, save_model
from .config import PRESETS, ModelConfig
from .generate import generate, stream
from .transformer import Transformer

__all__ = [
    "PRESETS",
    "ModelConfig",
    "Transformer",
    "generate",
    "load_model",
    "make_or_load",
    "read_config",
    "save_model",
    "stream",
]
