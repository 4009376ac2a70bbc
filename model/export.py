"""Write a model as a GGUF file, which llama.cpp and the programs built on it run.

    python -m model.export --model out/student --gguf out/student.gguf
    llama-cli -m out/student.gguf -p "ROMEO:"          # with llama.cpp

One file holds the weights under GGUF's names, the sizes, the tokenizer, its chat template and the
tokens that begin and end a text. --dtype says how matrices are stored: q8_0 has blocks of 32 whole
numbers of 8 bits with a scale each, half the size of f16. Norms and biases stay float32, as
llama.cpp wants them. dataset.fetch_teacher --gguf reads such a file back.
"""

import argparse
from pathlib import Path

import numpy as np

import files
from files import command_line

from .checkpoint import is_finite, load_model
from .experts import ExpertsConfig
from .gguf_names import ROPE_FACTORS, gguf_library, names_in_gguf, rotary_order
from .gguf_tokenizer import tokenizer_fields
from .transformer import Transformer, rotary_frequencies

TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers of whole files


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=Path("out/student"), help="checkpoint folder to read")
    add("--gguf", type=Path, default=Path("out/student.gguf"), help="file to write")
    add("--dtype", choices=tuple(TYPES), default="f16", help="of the matrices in the file")
    add("--overwrite", action="store_true", help="replace the file that is there")
    return parser.parse_args(argv)


def main(args) -> None:
    files.check_apart(args, is_folder=False, flag="gguf")
    if args.gguf.exists() and not args.overwrite:
        raise ValueError(f"{args.gguf} exists: pass another --gguf, or --overwrite to replace it")
    model = load_model(args.model, dtype=None)
    print(write_gguf(model, args.model, args.gguf, args.dtype))


def settings(model: Transformer, folder: Path) -> tuple[str, dict[str, object]]:
    """GGUF's name of the architecture, and its settings: names -> values."""
    c = model.config
    if isinstance(c, ExpertsConfig):
        raise ValueError(f"{folder} has experts, which are not exported: use a dense model")
    kind = c.to_json()["model_type"]
    if kind == "qwen2" and c.num_attention_heads * c.head_dim != c.hidden_size:
        sizes = f"{c.num_attention_heads} heads of width {c.head_dim} at width {c.hidden_size}"
        cure = "use a model whose heads add up to its width"
        raise ValueError(f"{folder} is a qwen2 with {sizes}, which llama.cpp does not load: {cure}")
    sizes = {
        "vocab_size": c.vocab_size, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta, "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }  # fmt: skip
    fields = {"general.name": folder.resolve().name, "general.quantization_version": 2}
    fields |= {f"{kind}.{name}": value for name, value in sizes.items()}
    return kind, fields | tokenizer_fields(folder, c.vocab_size)


def write_gguf(model: Transformer, folder: Path, path: Path, dtype: str) -> str:
    """Write `model`, and the tokenizer in `folder`, as a GGUF file; one line about it. One matrix
    at a time is converted. Raises ValueError for what llama.cpp has no form for."""
    gguf, config, state = gguf_library(), model.config, model.state_dict()
    kind, fields = settings(model, Path(folder))
    types = gguf.GGMLQuantizationType
    names = names_in_gguf(kind, state, config.num_hidden_layers)
    tensors = {names[name]: tensor for name, tensor in state.items()}
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    if (scaling := config.rope_scaling) is not None:
        plain = rotary_frequencies(config.head_dim, config.rope_theta)
        scaled = rotary_frequencies(config.head_dim, config.rope_theta, scaling)
        tensors[ROPE_FACTORS] = plain / scaled
    chosen = {}
    for name, tensor in tensors.items():
        fits = dtype != "q8_0" or tensor.shape[-1] % 32 == 0  # whole blocks in every row
        matrix = types[dtype.upper()] if fits else types.F16
        chosen[name] = types.F32 if tensor.ndim == 1 else matrix
    with files.atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, kind)
        writer.add_file_type(TYPES[dtype])
        for name, value in fields.items():
            add_field(writer, name, value)
        for name, tensor in tensors.items():
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, chosen[name])
            size = shape[-1] * (tensor.numel() // tensor.shape[-1])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, chosen[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                tensor = tensor[rotary_order(len(tensor) // config.head_dim, config.head_dim, True)]
            if chosen[name] == types.F16 and not is_finite(tensor.half()):
                beyond = f"{name} has values that float16 does not hold"
                raise ValueError(f"{beyond}: use --dtype bf16")
            writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), chosen[name]))
        writer.close()
    size = path.stat().st_size / 1e6
    return f"{path}: {kind}, {len(tensors)} tensors, {size:,.1f} MB in {dtype}"


def add_field(writer, name: str, value) -> None:
    """Add a setting by its Python type; what is listed is of one type."""
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


if __name__ == "__main__":
    command_line(main, parse_args())
