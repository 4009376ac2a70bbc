"""What learns: the Transformer, its presets, generation, and Hugging Face checkpoint folders."""

from .checkpoint import (
    load_for,
    load_model,
    make_or_load,
    number_of_layers,
    read_config,
    save_model,
    weights_hash,
)
from .config import PRESETS, ModelConfig
from .experts import ExpertsConfig, add_experts
from .generate import generate, stream
from .prune import layers_named
from .stored import store_weights, stored_bytes
from .transformer import Record, Transformer
