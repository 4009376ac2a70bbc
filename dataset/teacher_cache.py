"""Pay the teacher once: write what it says about every training window to a file, and read it.

    python -m dataset.teacher_cache --teacher out/teacher          # writes out/sample.cache
    python -m methods.cached_teacher                               # a student that learns from it

The file is a JSON header of 4,096 bytes, a record per window of S tokens, of what --method keeps,
and the sha256 of all that, 32 bytes:

    hidden    hidden (S, E)                        logits = hidden @ head.T, at every temperature
    topk      ids, log_probs (S, k), rest (S)      rest: log of the other tokens' mass
    sample    ids, log_probs (S, k), rest (S)      rest: entropy of the distribution

topk and sample (distill/sparse.py) hold for the one --temperature they were made at. The header has
the sha256 of what the file was made from: no shape and no loss curve would show another teacher.
A call that was stopped resumes. Shapes: B batch, S sequence, V vocabulary, E width of the teacher.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import files
from distill.sparse import sample, top_k
from files import check_file, check_ranges, command_line, known_hash, new_parser
from files.atomic import move, parse_json
from files.progress import progress_bar
from model import load_for, weights_hash
from model.device import autocast, choose_device, choose_precision, keep_freed_memory

from .packing import PackedText

HEADER_BYTES, HASH_BYTES = 4096, 32
METHODS = ("topk", "sample", "hidden")
SIZES = ("windows", "seq_len", "k", "vocab_size", "teacher_width")
ROWS = 32  # windows of one teacher pass
SYNCED = 64 * ROWS  # windows between two syncs to the disk


def source_of(teacher, text) -> dict:
    hashes = {"teacher_sha256": weights_hash(teacher), "text_sha256": text.sha256}
    hashes["teacher_config_sha256"] = known_hash(Path(teacher) / "config.json")
    return {**hashes, "tokenizer_sha256": text.tokenizer_sha256, "seq_len": text.seq_len}


def record_dtype(header: dict) -> np.dtype:
    """The layout of one window; numbers are float16."""
    S, k = header["seq_len"], header["k"]
    if header["method"] == "hidden":
        return np.dtype([("hidden", np.float16, (S, header["teacher_width"]))])
    id_type = np.uint16 if header["vocab_size"] <= 2**16 else np.uint32
    kept = [("ids", id_type, (S, k)), ("log_probs", np.float16, (S, k))]
    return np.dtype([*kept, ("rest", np.float16, (S,))])


def read_header(path) -> dict:
    """The header of a cache file. Raises ValueError where the file is missing or is no cache."""
    path, make = Path(path), f"make it with: python -m dataset.teacher_cache --out {path}"
    with open(check_file(path, make, f"no teacher cache in '{path}'"), "rb") as file:
        raw = file.read(HEADER_BYTES)
        file.seek(max(0, path.stat().st_size - HASH_BYTES))
        written = file.read(HASH_BYTES).hex()
    try:
        header = parse_json(raw, "its header")
        least = {"windows": 0, "k": int(header.get("method") != "hidden")}  # of others 1
        if header.get("method") not in METHODS:
            raise ValueError(f"method {header.get('method')!r}")
        for name in SIZES:
            if type(n := header.get(name)) is not int or not least.get(name, 1) <= n <= 10**12:
                raise ValueError(f"{name} {n!r}")
        size = HEADER_BYTES + header["windows"] * record_dtype(header).itemsize + HASH_BYTES
    except ValueError as error:
        raise ValueError(f"{path} is not a teacher cache ({error}): pass another path") from None
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path} has {found:,} bytes, its header says {size:,}: delete it, {make}")
    if known_hash(path, HASH_BYTES) != written:
        raise ValueError(f"{path} is damaged: its bytes are not those written; delete it, {make}")
    return header


class CachedText:
    """Packed text whose batches carry what the teacher said about them. Raises ValueError, naming
    what differs, for a file that was not made for this run."""

    def __init__(self, text: PackedText, path, teacher_folder, temperature: float):
        header, wanted = read_header(path), source_of(teacher_folder, text)
        if header["method"] != "hidden":  # which serves every temperature
            wanted["temperature"] = temperature
        for name, value in wanted.items():
            if (made := header.get(name)) != value:
                differs = f"was made with {name} {str(made)[:12]}, this run has {str(value)[:12]}"
                flags = f"--teacher {teacher_folder} --data {text.folder} --seq_len {text.seq_len}"
                flags += f" --temperature {temperature:g} (or --method hidden) --overwrite"
                again = f"python -m dataset.teacher_cache {flags} --out {path}"
                raise ValueError(f"{path} {differs}: make it again with: {again}")
        if (windows := header["windows"]) < text.size:
            few = f"{path} holds {windows:,} windows, this run needs {text.size:,}"
            raise ValueError(f"{few}: use one --data_share for both")
        self.text, self.method, self.files = text, header["method"], [*text.files, path]
        self.records = np.memmap(path, record_dtype(header), "r", HEADER_BYTES, (windows,))

    def __getattr__(self, name: str):
        return getattr(self.text, name)  # held_out, vocab_size, ...

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, ...]:
        """input_ids and labels (B, S), then the fields of their records, each (B, S, ...)."""
        windows = self.text.window_ids(step, batch_size, seed)
        return *self.text.take(windows), *self.take(windows)

    def take(self, windows: np.ndarray) -> tuple[Tensor, ...]:
        records = self.records[windows]
        fields = (np.ascontiguousarray(records[name]) for name in records.dtype.names)
        # torch gathers by signed integers
        signed = (x.astype(np.int64) if x.dtype.kind == "u" else x for x in fields)
        return tuple(map(torch.from_numpy, signed))


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="out/teacher", help="checkpoint folder")
    add("--data", default="out/data", help="folder made by dataset.prepare")
    add("--out", type=Path, help="file to write; default out/METHOD.cache")
    add("--overwrite", action="store_true", help="replace the file in --out")
    add("--method", choices=METHODS, default="sample", help="what to keep")
    add("--k", type=int, default=64, help="of topk and sample: tokens to keep")
    add("--temperature", type=float, default=1.0, help="T of topk and sample")
    add("--seq_len", type=int, default=128, help="tokens of a sequence, as the students will train")
    add("--data_share", type=float, default=1.0, help="first part of the text, as a share of it")
    add("--seed", type=int, default=0, help="of sample")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the teacher")
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args)
    path = args.out = args.out or Path(f"out/{args.method}.cache")
    files.check_apart(args, is_folder=False)
    keep_freed_memory()
    device = choose_device(args.device)
    args.dtype = choose_precision(args.dtype, device)
    text = PackedText(args.data, "train", args.seq_len, args.data_share)
    teacher = load_for(args.teacher, text, device)
    sparse = args.method != "hidden"
    if sparse and args.k > text.vocab_size:
        raise ValueError(f"--k {args.k} must be between 1 and the vocabulary, {text.vocab_size}")
    header = {
        "format": "minidistill teacher cache 3", "method": args.method, "dtype": args.dtype,
        "k": args.k if sparse else 0, "temperature": args.temperature if sparse else 1.0,
        "seed": args.seed if args.method == "sample" else 0, "windows": text.size,
        "vocab_size": text.vocab_size, "teacher_width": teacher.config.hidden_size,
        **source_of(args.teacher, text),
    }  # fmt: skip
    files.lock(path)
    if path.exists() and not args.overwrite:
        before = read_header(path)
        if other := [name for name, value in header.items() if before.get(name) != value]:
            cure = "pass --overwrite to replace it, or another --out"
            raise ValueError(f"{path} was made with another {', '.join(other)}: {cure}")
        raise files.Finished(f"{path}: finished already")
    write(path, header, teacher, text, device, args.overwrite)
    files.unlock(path)
    return header


def write(path: Path, header: dict, teacher, text, device, overwrite: bool) -> None:
    """Run the teacher over all windows; raises ValueError for too small a disk."""
    layout, last = record_dtype(header), header["windows"]
    partial = path.with_name(path.name + ".partial")
    growing = files.GrowingFile(partial, header, overwrite, windows=0)
    first = growing.record["windows"]
    with growing.file as file, progress_bar(last, path.name, first, unit="window") as bar:
        size = (last - first) * layout.itemsize / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        if size > 0.95 * free:
            need = f"the cache needs {size:,.0f} MB more at {path}, {free:,.0f} MB are free"
            raise ValueError(f"{need}: make room, or lower --k or --data_share")
        print(f"{path}: {layout.itemsize / text.seq_len:,.0f} bytes per token, {size:,.0f} MB")
        if first == 0:
            file.write(json.dumps(header, indent=1).encode("ascii").ljust(HEADER_BYTES - 1) + b"\n")
        for start in range(first, last, ROWS):
            windows = np.arange(start, min(start + ROWS, last))
            fields = teacher_output(teacher, text.take(windows)[0].to(device), header, start)
            records = np.empty(len(windows), layout)
            for name, values in zip(layout.names, fields, strict=True):
                records[name] = values.cpu().numpy().reshape(records[name].shape)
            records.tofile(file)
            bar.update(len(windows))
            end = start + len(windows)
            if end % SYNCED == 0 or end == last:
                growing.commit(windows=end)
    with open(partial, "ab") as file:  # stopped here, a call cuts it off and does it again
        file.write(bytes.fromhex(files.file_hash(partial)))
        file.flush()
        os.fsync(file.fileno())
    move(partial, path)
    growing.record_path.unlink()


@torch.no_grad()
def teacher_output(teacher, input_ids: Tensor, header: dict, start: int) -> tuple[Tensor, ...]:
    """The fields of the records of windows (B, S), each with B * S rows."""
    with autocast(input_ids.device, header["dtype"]):
        hidden = teacher.model(input_ids)
        if header["method"] == "hidden":
            return (hidden.half().flatten(0, 1),)
        logits = teacher.lm_head(hidden).float().flatten(0, 1)
    log_probs = (logits / header["temperature"]).log_softmax(-1)
    if header["method"] == "topk":
        return top_k(log_probs, header["k"])
    # One generator per pass: a call that goes on draws what the stopped one would have drawn.
    generator = torch.Generator(logits.device).manual_seed(header["seed"] * 2**32 + start)
    return sample(log_probs, header["k"], generator)


if __name__ == "__main__":
    command_line(main, parse_args())
