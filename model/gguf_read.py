"""Read a model out of a GGUF file: a Llama, a Qwen2 or a Qwen3, quantised or not.

GGUF holds a table of settings and one tensor per weight matrix, mostly in blocks of 32 or 256
numbers of 4 to 8 bits with a scale per block. The `gguf` library reads the file and turns blocks
into numbers; here they get our names and our order, a few rows at a time, so that memory does not
grow with the model. What this model could not compute faithfully is refused by name.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files import check_file

from .config import MODEL_TYPES, Llama3Scaling, ModelConfig
from .gguf_names import ROPE_FACTORS, gguf_library, names_in_gguf, rotary_order
from .transformer import Transformer, rotary_frequencies

BLOCK = 1 << 22  # numbers that are made at a time
# Settings that change what a model computes, and the only value that is computed here. A factor of
# scaling without a type is a linear one to llama.cpp.
REFUSED = {
    "expert_count": 0, "attention.sliding_window": 0, "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "attention.scale": 0.0,
    "attention.causal": True, "logit_scale": 0.0, "residual_scale": 0.0, "embedding_scale": 0.0,
}  # fmt: skip


class GGUF:
    """A GGUF file that holds a model of ours: `config`, `fields` and `tensors`. Raises ValueError
    naming what is wrong with the file, or what of it is not supported."""

    def __init__(self, path):
        self.path, self.library = Path(path), (gguf := gguf_library())
        with open(check_file(path, "pass a GGUF file"), "rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                other = f"{path} is not a GGUF file (it begins with {magic!r})"
                raise ValueError(f"{other}: pass one, such as llama.cpp reads")
        try:  # a file that was cut short shows in many ways
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:
            cure = "it is cut short, damaged, or of a newer kind; download it again"
            raise ValueError(f"{path} is not a readable GGUF file ({error}): {cure}") from None
        if reader.byte_order != "I":
            raise ValueError(f"{path} is a GGUF file of the other byte order: download another")
        if (parts := self.fields.get("split.count", 1)) not in (0, 1):
            cure = "join them with llama.cpp's llama-gguf-split --merge"
            raise ValueError(f"{path} is one of {parts} files that belong together: {cure}")
        self.kind = self.field("general.architecture", str)
        if self.kind not in MODEL_TYPES:
            other = f"{path}: architecture '{self.kind}' is not supported"
            raise ValueError(f"{other}: use a GGUF of {', '.join(MODEL_TYPES)}")
        self.found = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self.read_config()
        self.names = self.check_tensors()

    def field(self, name: str, kind: type, default=None):
        """The value of a setting; "." at the start stands for the architecture's own. Raises
        ValueError where it is of another kind, or missing and without a default."""
        name = f"{self.kind}{name}" if name.startswith(".") else name
        value = self.fields.get(name, default)
        if value is None:
            raise ValueError(f"{self.path} has no setting {name}: it is incomplete, use another")
        if type(value) is not kind:
            raise ValueError(f"{self.path}: {name} = {value!r:.60} is no {kind.__name__}")
        return value

    def texts(self, name: str, default: list[str] | None = None) -> list[str]:
        """A setting that is a list of texts."""
        found = self.field(name, list, default)
        if not all(isinstance(text, str) for text in found):
            raise ValueError(f"{self.path}: {name} is no list of texts: download it again")
        return found

    def read_config(self) -> ModelConfig:
        for name, expected in REFUSED.items():
            if (value := self.fields.get(f"{self.kind}.{name}", expected)) != expected:
                other = f"{self.path}: {self.kind} with {name} = {value!r:.60} is not supported"
                raise ValueError(f"{other}, only {expected!r}: use another model")
        D, H = self.field(".embedding_length", int), self.field(".attention.head_count", int)
        if "token_embd.weight" not in self.found:
            raise ValueError(f"{self.path} has no tensor token_embd.weight: download it again")
        head_dim = self.field(".attention.key_length", int, D // max(H, 1))
        for name in ("attention.value_length", "rope.dimension_count"):
            if (other := self.field(f".{name}", int, head_dim)) != head_dim:
                differs = f"{self.path}: {name} = {other} is not the head width, {head_dim}"
                raise ValueError(f"{differs}: such heads are not supported, use another model")
        theta = decimal(self.field(".rope.freq_base", float, 10000.0))
        try:
            return ModelConfig(
                int(self.found["token_embd.weight"].shape[-1]), D,
                self.field(".block_count", int), H,
                self.field(".attention.head_count_kv", int, H), head_dim,
                self.field(".feed_forward_length", int), self.field(".context_length", int),
                rope_theta=theta, rope_scaling=self.read_scaling(head_dim, theta),
                rms_norm_eps=decimal(self.field(".attention.layer_norm_rms_epsilon", float)),
                tie_word_embeddings="output.weight" not in self.found,
                attention_bias=self.kind == "qwen2", qk_norm=self.kind == "qwen3",
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def read_scaling(self, head_dim: int, theta: float) -> Llama3Scaling | None:
        """Llama 3's scaling, of which a GGUF only has the factor that divides each frequency."""
        if ROPE_FACTORS not in self.found:
            return None
        found = torch.from_numpy(np.array(self.found[ROPE_FACTORS].data, dtype=np.float32))
        plain = rotary_frequencies(head_dim, theta)
        for original in (2**k for k in range(5, 18)):  # 8,192 in those that Meta published
            scaling = Llama3Scaling(float(found.max()), 1.0, 4.0, original)
            factors = plain / rotary_frequencies(head_dim, theta, scaling)
            if found.shape == factors.shape and torch.allclose(found, factors, rtol=1e-4):
                return scaling
        other = f"{ROPE_FACTORS} is not Llama 3's rotary scaling with low and high factors 1 and 4"
        raise ValueError(f"{other}: such a scaling is not supported, use another model")

    def check_tensors(self) -> dict[str, str]:
        """GGUF's name of each of our tensors. Raises ValueError for one that is unknown, missing,
        of another shape, or quantised in a way that the library cannot read."""
        with torch.device("meta"):
            wanted = Transformer(self.config).state_dict()
        if self.config.tie_word_embeddings:
            del wanted["lm_head.weight"]
        theirs = names_in_gguf(self.kind, wanted, self.config.num_hidden_layers)
        known, names = {name: ours for ours, name in theirs.items()}, {}
        for name, tensor in self.found.items():
            if name == ROPE_FACTORS:
                continue
            if (ours := known.get(name)) is None:
                unknown = f"{self.path}: tensor {name} is unknown in a {self.kind}"
                raise ValueError(f"{unknown}: what it does would be left out, use another model")
            names[ours] = name
            shape = tuple(int(size) for size in reversed(tensor.shape))
            if shape != (expected := tuple(wanted[ours].shape)):
                raise ValueError(f"{self.path}: {name} has shape {shape}, expected {expected}")
            try:
                self.library.quants.dequantize(rows_of(tensor)[:1], tensor.tensor_type)
            except NotImplementedError:
                kind = f"{self.path}: {name} is of type {tensor.tensor_type.name}"
                cure = "use a file of F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K"
                raise ValueError(f"{kind}, which the gguf library cannot read: {cure}") from None
        if missing := sorted(wanted.keys() - names.keys()):
            raise ValueError(f"{self.path} has no tensor for {missing[0]}: download it again")
        return {name: names[name] for name in wanted}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our tensors' names and shapes, in the order in which `rows` is best asked for them."""
        shapes = {ours: self.found[name].shape for ours, name in self.names.items()}
        return {ours: tuple(int(x) for x in reversed(shape)) for ours, shape in shapes.items()}

    def rows(self, ours: str) -> Iterator[Tensor]:
        """Our tensor `ours` as float32 blocks of whole rows, in order."""
        tensor, config = self.found[self.names[ours]], self.config
        data = rows_of(tensor)
        if self.kind == "llama" and ours.endswith(("q_proj.weight", "k_proj.weight")):
            # Rows are moved as they are packed: no block reaches over two rows.
            data = data[rotary_order(len(data) // config.head_dim, config.head_dim).numpy()]
        count = max(1, BLOCK * len(data) // max(tensor.n_elements, 1))
        for start in range(0, len(data), count):
            block = data[start : start + count]
            numbers = self.library.quants.dequantize(block, tensor.tensor_type)
            yield torch.from_numpy(np.array(numbers, dtype=np.float32))

    def types(self) -> dict[str, int]:
        """How many tensors are of each type, most first: {"Q4_1": 210, "F32": 61, "Q8_0": 1}."""
        types = [tensor.tensor_type.name for tensor in self.found.values()]
        return {name: types.count(name) for name in sorted(set(types), key=types.count)[::-1]}


def rows_of(tensor) -> np.ndarray:
    """A tensor's numbers or packed bytes as (rows, ...); a vector is one row."""
    return tensor.data.reshape(-1, tensor.data.shape[-1])


def decimal(value: float) -> float:
    """The shortest number that float32 stores as `value`: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
