"""Text as one long stream of token ids, memory-mapped, cut into windows.

Every document ends with <|endoftext|>; documents stand one after another, so no token is padding.
Window i is tokens [i*S, i*S + S] of the stream: its inputs are the first S, its labels the same
tokens shifted left by one. This is the only place where packed labels are shifted.

The batch of step n depends on (data, seed, n) alone: every epoch is a permutation of the windows
drawn from (seed, epoch). That is what makes a resumed run equal to one that was never stopped.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from run.files import atomic_path, read_json


def write_stream(path: Path, documents: list[list[int]], vocab_size: int, end_id: int) -> dict:
    """Write documents (lists of ids) as one stream; returns its dtype and length in tokens."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for ids in documents:
            np.asarray(ids + [end_id], dtype=dtype).tofile(file)
            count += len(ids) + 1
    return {"dtype": np.dtype(dtype).name, "tokens": count}


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), the same on every machine for the same (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class PackedText:
    """One split ("train" or "val") of a prepared data folder, as windows of seq_len tokens.

    share uses only the first part of the stream (0 < share <= 1).
    Raises ValueError for a folder that was not prepared, or is too small for one window.
    """

    def __init__(self, folder, split: str, seq_len: int, share: float = 1.0):
        self.folder = Path(folder)
        self.seq_len = seq_len
        if not (self.folder / "meta.json").is_file():
            raise ValueError(
                f"no prepared data in '{folder}': make it with: python -m dataset.prepare "
                f"--out {folder}"
            )
        self.meta = read_json(self.folder / "meta.json")
        path = self.folder / f"{split}.bin"
        try:
            about = self.meta[split]
            dtype, bytes_, _ = np.dtype(about["dtype"]), about["bytes"], self.meta["vocab_size"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder / 'meta.json'} is damaged ({error}): prepare it again with: "
                f"python -m dataset.prepare --out {folder}"
            ) from None
        if not path.is_file() or path.stat().st_size != about["tokens"] * dtype.itemsize:
            raise ValueError(
                f"{path} does not hold the {about['tokens']} tokens that meta.json names: "
                f"prepare it again with: python -m dataset.prepare --out {folder}"
            )
        self.stream = np.memmap(path, dtype=dtype, mode="r")
        self.bytes_per_token = bytes_ / about["tokens"]
        self.size = int((len(self.stream) - 1) // seq_len * share)
        if self.size < 1:
            raise ValueError(
                f"{path} holds {len(self.stream)} tokens, of which a share of {share} is less than "
                f"one window of {seq_len}: lower --seq_len or prepare more text"
            )
        self.epoch, self.order = None, None

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    def window_ids(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Which windows make up the batch of `step`: (batch_size,)."""
        first = step * batch_size
        chosen = []
        for index in range(first, first + batch_size):
            epoch, place = divmod(index, self.size)
            if (seed, epoch) != self.epoch:
                self.epoch, self.order = (seed, epoch), epoch_order(self.size, seed, epoch)
            chosen.append(self.order[place])
        return np.array(chosen)

    def take(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and labels of those windows: two (B, S) int64 tensors."""
        rows = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        tokens = torch.from_numpy(self.stream[rows].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels (B, S) of one training step."""
        return self.take(self.window_ids(step, batch_size, seed))

    def evaluation_batches(self, batch_size: int, most_windows: int):
        """A fixed set of at most most_windows windows, spread evenly over the split."""
        count = min(self.size, most_windows)
        chosen = np.linspace(0, self.size - 1, count).astype(np.int64)
        for start in range(0, count, batch_size):
            yield self.take(chosen[start : start + batch_size])
