"""Text as one long stream of token ids, memory-mapped, cut into windows.

Every document ends with <|endoftext|>; documents stand one after another, so no token is padding.
Window i is tokens [i*S, i*S + S] of the stream: its inputs are the first S, its labels the same
tokens shifted left by one. This is the only place where packed labels are shifted.

The batch of step n depends on (data, seed, n) alone, as every epoch is a permutation of the windows
drawn from (seed, epoch): so a resumed run equals one that was never stopped.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import files
from files import atomic_path, check_file, check_keys, known_hash, read_json
from files.atomic import UNFINISHED


def write_stream(path: Path, documents: list[list[int]], vocab_size: int, end_id: int) -> dict:
    """Write documents (lists of ids) as one stream; returns its dtype, tokens and largest id."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    tokens, largest = 0, end_id
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for ids in documents:
            np.asarray(ids + [end_id], dtype=dtype).tofile(file)
            tokens, largest = tokens + len(ids) + 1, max(largest, max(ids, default=0))
    return {"dtype": np.dtype(dtype).name, "tokens": tokens, "largest": largest}


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), the same on every machine for the same (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def check_prepared(folder: Path, made_from: dict, overwrite: bool) -> None:
    """Lock a folder that is about to be prepared. Raises Finished where it is, from `made_from`;
    ValueError where it holds what others made, or from something else, unless to `overwrite`."""
    files.lock(folder, wait=True)  # of two calls the second finds it prepared
    files.check_free(folder, ("meta.json", UNFINISHED), overwrite)
    if overwrite or not (folder / "meta.json").is_file():
        return
    PackedText(folder, "train", 1)  # raises where it is damaged
    meta = {"made_from": {}, "files": {}, **read_json(folder / "meta.json")}
    check_keys(meta, folder / "meta.json", made_from=dict, files=dict)
    written = {str(folder / name): digest for name, digest in meta["files"].items()}
    cure = "pass --overwrite to replace it, or another --out"
    files.check_unchanged(written, folder, cure)
    if other := [k for k, value in made_from.items() if meta["made_from"].get(k) != value]:
        raise ValueError(f"{folder} was prepared with another {', '.join(other)}: {cure}")
    raise files.Finished(f"{folder}: prepared already, from the same text and flags")


class PackedText:
    """One split ("train" or "val") of a prepared data folder, as windows of seq_len tokens. share
    (above 0 to 1): of the stream, its first part. The training split has the other as `held_out`.
    Raises ValueError for a folder that is not prepared, is no longer what was prepared, or holds no
    window."""

    padded = False

    def __init__(self, folder, split: str, seq_len: int, share: float = 1.0):
        self.folder = self.tokenizer_folder = Path(folder)
        self.seq_len = seq_len
        about, path = self.folder / "meta.json", self.folder / f"{split}.bin"
        make = f"make it with: python -m dataset.prepare --out {folder}"
        of_file = "it is a file; --data takes the folder that dataset.prepare makes of it"
        cure = of_file if self.folder.is_file() else make
        check_file(about, cure, f"no prepared data in '{folder}'")
        meta = read_json(about, vocab_size=int, tokenizer_sha256=str, **{split: dict})
        make = f"{make} --overwrite, and the flags it had"
        part = check_keys(meta[split], about, dtype=str, tokens=int, bytes=int, sha256=str)
        known = part["dtype"] in ("uint16", "uint32") and 0 < part["bytes"] < 10**18
        if not known or not part["tokens"]:
            raise ValueError(f"{about} is damaged (no tokens, or of another type): {make}")
        dtype, tokens = np.dtype(part["dtype"]), part["tokens"]
        self.bytes_per_token, self.sha256 = part["bytes"] / tokens, part["sha256"]
        self.vocab_size, self.tokenizer_sha256 = meta["vocab_size"], meta["tokenizer_sha256"]
        if not path.is_file() or path.stat().st_size != tokens * dtype.itemsize:
            raise ValueError(f"{path} does not hold the {tokens} tokens of meta.json: {make}")
        self.files = [path, self.folder / "tokenizer.json"]
        for file, digest in zip(self.files, (self.sha256, self.tokenizer_sha256), strict=True):
            if not file.is_file() or known_hash(file) != digest:
                raise ValueError(f"{file} is not the one whose sha256 is in meta.json: {make}")
        self.stream = np.memmap(path, dtype=dtype, mode="r")
        largest = part["largest"] if type(part.get("largest")) is int else self.stream.max()
        if largest >= self.vocab_size:  # folders of earlier versions do not say the largest
            outside = f"{path} has the id {largest}, outside its vocabulary of {self.vocab_size}"
            raise ValueError(f"{outside}: {make}")
        self.size = int((len(self.stream) - 1) // seq_len * share)
        if self.size < 1:
            less = f"a share of {share} is less than one window of {seq_len}: lower --seq_len"
            raise ValueError(f"{path} holds {len(self.stream)} tokens, of which {less}")
        self.held_out = PackedText(folder, "val", seq_len) if split == "train" else None
        self.files += self.held_out.files if self.held_out else []

    def special_ids(self):
        """Text has no turns and no tags: raises ValueError, where a lesson asks for them."""
        jsonl = self.folder / "reason_train.jsonl"
        raise ValueError(f"{self.folder} is text: to learn traces, pass a jsonl: --data {jsonl}")

    def window_ids(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Which windows make up the batch of `step`: (batch_size,)."""
        numbers = range(step * batch_size, (step + 1) * batch_size)
        places = (divmod(number, self.size) for number in numbers)
        return np.array([epoch_order(self.size, seed, epoch)[index] for epoch, index in places])

    def take(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and labels of those windows: two (B, S) int64 tensors."""
        rows = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        tokens = torch.from_numpy(self.stream[rows].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels (B, S) of one training step."""
        return self.take(self.window_ids(step, batch_size, seed))

    def evaluation(self, batch_size: int, most: int):
        """Batches of at most `most` windows, spread evenly over the split: the same ones always."""
        chosen = np.linspace(0, self.size - 1, min(self.size, most)).astype(np.int64)
        for start in range(0, len(chosen), batch_size):
            yield self.take(chosen[start : start + batch_size])
