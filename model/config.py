"""The shape of a decoder-only Transformer: one frozen dataclass, its presets, and its config.json.

The field names are Hugging Face's, so a downloaded Llama, Qwen2 or Qwen3 folder is read as it is.
What cannot be computed faithfully (other rotary scalings than Llama 3's, sliding windows, other
activations) is refused by name: a model that loads but computes something else is worse than one
that does not.
"""

from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

LARGEST, MOST_LAYERS = 10**7, 1000  # a stranger's config.json may ask for more than memory holds
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MODEL_TYPES = ("llama", "qwen2", "qwen3")  # of the same: what GGUF calls them, too


class Llama3Scaling(NamedTuple):
    """How Llama 3.1 and later slow their rotations down (model/transformer.py has the formula)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_json(cls, rope: dict) -> "Llama3Scaling":
        """Of config.json's rope_scaling or rope_parameters. Raises ValueError for what is none."""
        values = [rope.get(name) for name in cls._fields]
        for name, value in zip(cls._fields, values, strict=True):
            if type(value) not in (int, float) or not 0 < value < LARGEST:
                raise ValueError(f"llama3 rope_scaling: {name} = {value!r} must be above 0")
        found = cls(*map(float, values[:3]), values[3])
        if found.low_freq_factor >= found.high_freq_factor:
            limits = f"{found.low_freq_factor:g} and {found.high_freq_factor:g}"
            raise ValueError(f"llama3 rope_scaling: of the factors {limits} the low must be lower")
        return found


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a `Transformer`. Raises ValueError for sizes that cannot work."""

    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # of the q, k and v projections: Qwen2
    qk_norm: bool = False  # every query and key head is normalised before its rotation: Qwen3
    rope_scaling: Llama3Scaling | None = None

    def __post_init__(self):
        for field in fields(self):
            value, name = getattr(self, field.name), field.name
            most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
            if field.type is int and (type(value) is not int or not 1 <= value <= most):
                allowed = f"must be a positive integer, at most {most}"
                raise ValueError(f"config: {name} = {value!r} {allowed}")
            if field.type is float and not 0 <= value < float("inf"):
                raise ValueError(f"config: {name} = {value!r} must be a number, 0 or more")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"config: {name} = {value!r} must be true or false")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"config: {heads} heads cannot share {shared} key-value heads equally")
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim = {self.head_dim} must be even for RoPE")
        if self.attention_bias and self.qk_norm:
            raise ValueError("config: attention_bias (Qwen2) excludes qk_norm (Qwen3)")

    @classmethod
    def preset(cls, name: str, vocab_size: int) -> "ModelConfig":
        """The configuration called `name` in PRESETS, for a tokenizer of `vocab_size` tokens."""
        if name not in PRESETS:
            made = "or a checkpoint folder (python train_distillation.py makes out/student)"
            cure = f"use one of {', '.join(PRESETS)}, {made}"
            raise ValueError(f"no model preset or checkpoint folder '{name}': {cure}")
        D, L, H, K, inner, positions = PRESETS[name]
        return cls(vocab_size, D, L, H, K, D // H, inner, positions)

    def to_json(self) -> dict:
        """The content of a Hugging Face config.json that computes the same model."""
        index = 2 if self.qk_norm else 1 if self.attention_bias else 0
        shape = asdict(self)
        del shape["qk_norm"], shape["rope_scaling"]
        if self.rope_scaling is not None:
            shape["rope_scaling"] = {"rope_type": "llama3", **self.rope_scaling._asdict()}
        if index:
            del shape["attention_bias"]  # Qwen2 implies it, and Qwen3 reads it with o_proj included
        return {
            "architectures": [ARCHITECTURES[index]],
            "model_type": MODEL_TYPES[index],
            **shape,
            "hidden_act": "silu", "attention_dropout": 0.0, "dtype": "float32",
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip

    @classmethod
    def from_json(cls, config: dict) -> "ModelConfig":
        """Read a config.json. Raises ValueError for what this model cannot compute."""
        named = config.get("architectures") or ["none"]
        architecture = named[0] if isinstance(named, list) else named
        if architecture not in ARCHITECTURES:
            cure = f"use a checkpoint of {', '.join(ARCHITECTURES)} or MixtralForCausalLM"
            raise ValueError(f"architecture '{architecture}' is not supported: {cure}")
        # transformers 5 moved the rotary settings into "rope_parameters".
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
            raise ValueError(f"rope_scaling = {rope!r} is not supported: choose another checkpoint")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            other = f"{architecture} with rope_type = {rope_type!r} is not supported"
            raise ValueError(f"{other}, only 'default' and 'llama3': choose another checkpoint")
        scaling = Llama3Scaling.from_json(rope) if rope_type == "llama3" else None
        biased = architecture == "Qwen2ForCausalLM"
        for name, value, expected in (
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
            ("attention_bias", config.get("attention_bias", biased), biased),
            ("mlp_bias", config.get("mlp_bias", False), False),
            ("quantization_config", config.get("quantization_config"), None),
            ("partial_rotary_factor", config.get("partial_rotary_factor", 1.0), 1.0),
            ("a rotary factor", rope.get("partial_rotary_factor", 1.0), 1.0),
            ("a rope_scaling without a type", "factor" in rope and rope_type == "default", False),
        ):
            if value != expected:
                other = f"{architecture} with {name} = {value!r} is not supported"
                raise ValueError(f"{other}, only {expected!r}: choose another checkpoint")
        try:
            D, H = config["hidden_size"], config["num_attention_heads"]
            # Defaults are those of transformers for a key that an older config.json leaves out.
            return cls(
                config["vocab_size"], D, config["num_hidden_layers"], H,
                config.get("num_key_value_heads") or H, config.get("head_dim") or D // H,
                config["intermediate_size"], config.get("max_position_embeddings", 2048),
                rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                attention_bias=biased, qk_norm=architecture == "Qwen3ForCausalLM",
                rope_scaling=scaling,
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"config.json has no key {error}: it is incomplete") from None
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"config.json has a value of the wrong type: {error}") from None


# name: width D, layers L, heads H, key-value heads K, intermediate size, positions.
# Parameters at a vocabulary of 2,048: nano 0.23M, micro 0.49M, mini 1.05M, midi 2.4M, small 5.0M;
# at MiniMind's 6,400: base 26M, large 104M.
PRESETS = {
    "nano": (64, 2, 2, 1, 192, 1024),
    "micro": (96, 3, 3, 1, 256, 1024),
    "mini": (128, 4, 4, 2, 384, 1024),
    "midi": (192, 5, 6, 2, 512, 1024),
    "small": (256, 6, 8, 4, 704, 1024),
    "base": (512, 8, 8, 2, 1408, 2048),
    "large": (768, 16, 8, 2, 2048, 2048),
}
