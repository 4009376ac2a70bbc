"""The file that holds a teacher's output for a training stream (written by dataset.cache_teacher).

    4,096 bytes     a JSON header, padded with spaces: what is inside, and hashes of the teacher's
                    weights, the text and the tokenizer that it was made from
    one record a window of S tokens, by method:
      hidden        hidden (S, E)                              exact at every temperature
      full          log_probs (S, V)                           exact at every temperature
      topk          ids (S, k), log_probs (S, k), rest (S)     rest: log mass of the other tokens
      sample        ids (S, k), log_probs (S, k), rest (S)     rest: entropy of the distribution

Numbers are float16, ids uint16 (uint32 above 65,536 tokens). A cache without its hashes would be a
trap: the same shapes come from another teacher, and no loss curve shows it. Shapes: B batch,
S sequence, V vocabulary, E width of the teacher.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill import HiddenTeacher, SparseTeacher
from model.checkpoint import weight_files
from run.files import file_hash

HEADER_BYTES = 4096
SPARSE = ("topk", "sample")  # keep k tokens
METHODS = (*SPARSE, "full", "hidden")
SIZES = ("windows", "seq_len", "k", "vocab_size", "teacher_width")


def source_hashes(teacher_folder, text) -> dict[str, str]:
    """What a cache is made from, by sha256: the teacher's weights, the text, the tokenizer."""
    hashes = [file_hash(path) for path in weight_files(Path(teacher_folder))]
    return {
        "teacher_sha256": hashes[0]
        if len(hashes) == 1
        else hashlib.sha256("".join(hashes).encode("ascii")).hexdigest(),
        "text_sha256": text.meta["train"]["sha256"],
        "tokenizer_sha256": text.meta["tokenizer_sha256"],
    }


def record_dtype(header: dict) -> np.dtype:
    """The layout of one window."""
    S, k, V, E = (header[name] for name in ("seq_len", "k", "vocab_size", "teacher_width"))
    if header["method"] == "hidden":
        return np.dtype([("hidden", np.float16, (S, E))])
    if header["method"] == "full":
        return np.dtype([("log_probs", np.float16, (S, V))])
    id_type = np.uint16 if V <= 2**16 else np.uint32
    return np.dtype(
        [
            ("ids", id_type, (S, k)),
            ("log_probs", np.float16, (S, k)),
            ("rest", np.float16, (S,)),
        ]
    )


def header_bytes(header: dict) -> bytes:
    text = json.dumps(header, indent=1).encode("ascii")
    assert len(text) < HEADER_BYTES, "a header has a dozen short fields"
    return text.ljust(HEADER_BYTES - 1) + b"\n"


def read_header(path) -> dict:
    """The header of a cache file. Raises ValueError where the file is missing or is no cache."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no teacher cache in '{path}': make it with: python -m dataset.cache_teacher "
            f"--out {path}"
        )
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    try:
        header = json.loads(raw.decode("ascii"))
        if header["method"] not in METHODS:
            raise ValueError(f"method {header['method']!r}")
        for name in SIZES:
            least = {"windows": 0, "k": int(header["method"] in SPARSE)}.get(name, 1)
            if type(header[name]) is not int or not least <= header[name] <= 10**12:
                raise ValueError(f"{name} {header[name]!r}")
        size = HEADER_BYTES + header["windows"] * record_dtype(header).itemsize
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a teacher cache ({error}): make one with: "
            "python -m dataset.cache_teacher"
        ) from None
    if path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, its header says {size:,}: delete it and "
            "make it again with: python -m dataset.cache_teacher"
        )
    return header


class TeacherCache:
    """A cache file, opened for one training run.

    head (V, E): the teacher's, which makes logits of hidden states.
    Raises ValueError, naming what differs, for a cache of another teacher, text, tokenizer, window
    length, temperature or of fewer windows than `text` has.
    """

    def __init__(self, path, teacher_folder, text, temperature: float, head: Tensor):
        header = read_header(path)
        for name, value in {**source_hashes(teacher_folder, text), "seq_len": text.seq_len}.items():
            if header.get(name) != value:
                raise ValueError(
                    f"{path} was made with {name} {str(header.get(name))[:12]}, this run has "
                    f"{str(value)[:12]}: make one for it with: python -m dataset.cache_teacher "
                    f"--teacher {teacher_folder} --data {text.folder} --seq_len {text.seq_len}"
                )
        if header["windows"] < text.size:
            raise ValueError(
                f"{path} holds {header['windows']:,} windows, this run needs {text.size:,}: make "
                "it again with a larger --data_share, or train with a smaller one"
            )
        self.method = header["method"]
        if self.method in SPARSE and header["temperature"] != temperature:
            raise ValueError(
                f"{path} holds probabilities at --temperature {header['temperature']:g}, this "
                f"run has {temperature:g}: make one for it, or use --method hidden or full, which "
                "serve every temperature"
            )
        self.head = head
        self.records = np.memmap(
            path, record_dtype(header), "r", offset=HEADER_BYTES, shape=(header["windows"],)
        )

    def take(self, windows: np.ndarray) -> tuple[Tensor, ...]:
        """The fields of those windows, each (B, S, ...), for `teacher`."""
        records = self.records[windows]
        fields = [records[name] for name in records.dtype.names]
        if fields[0].dtype.kind == "u":  # torch gathers by signed integers
            fields[0] = fields[0].astype(np.int64)
        return tuple(torch.from_numpy(np.ascontiguousarray(field)) for field in fields)

    def teacher(self, *fields: Tensor) -> HiddenTeacher | SparseTeacher | Tensor:
        """What `fused_mixed_loss` takes as a teacher, from the fields of `take`."""
        if self.method == "hidden":
            return HiddenTeacher(fields[0], self.head)
        if self.method == "full":
            return fields[0]
        ids, log_probs, rest = fields
        probs = log_probs.float().exp()
        # float16 rounds each probability by up to 0.2%: what they sum to is put right.
        if self.method == "sample":
            return SparseTeacher(ids, probs / probs.sum(-1, keepdim=True), entropy=rest.float())
        tail = rest.float().exp()
        total = probs.sum(-1) + tail
        return SparseTeacher(ids, probs / total[..., None], tail=tail / total)
