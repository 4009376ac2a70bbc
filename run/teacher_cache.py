"""Pay the teacher once: its last hidden states for every training window, kept in a file.

Students of one teacher see the same windows of the same text, whatever their seed, temperature or
alpha. The teacher's output for a window never changes, so computing it again for every student is
waste. Its logits are V numbers a token (2,048 here: 7 GB for the plays); the hidden state that they
are made from is D (128: 470 MB), and logits = hidden @ head.T is one matrix product. So the file
holds hidden states in float16, and the teacher's body runs once.

The header names the teacher's weights and the text by hash, the precision and the window length; a
file that was made from others is not used but made again.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import weight_files

from . import parallel
from .files import atomic_path, read_json, write_json
from .setup import autocast


class TeacherCache:
    """Hidden states (windows, S, D) of `teacher` on the training windows of `text`."""

    def __init__(self, teacher, teacher_folder, text, device, dtype: str):
        digest = hashlib.sha256()
        for file in weight_files(Path(teacher_folder)):
            digest.update(file.read_bytes())
        self.header = {
            "teacher_sha256": digest.hexdigest(),
            "dtype": dtype,
            "text_sha256": text.meta["train"]["sha256"],
            "seq_len": text.seq_len,
            "windows": text.size,
        }
        path = Path(teacher_folder) / f"hidden_{text.seq_len}.f16"
        header_path = path.with_suffix(".json")
        with parallel.main_first():
            try:
                known = read_json(header_path)
            except ValueError:  # missing or damaged: the cache is made again
                known = {}
            # A cache of more windows holds those of a smaller share of the text: it is a prefix.
            windows = max(known.get("windows", 0), text.size)
            shape = (windows, text.seq_len, teacher.config.hidden_size)
            whole = path.is_file() and path.stat().st_size == 2 * int(np.prod(shape))
            if not whole or known != {**self.header, "windows": windows}:
                shape = (text.size, *shape[1:])
                header_path.unlink(missing_ok=True)
                self.write(path, shape, teacher, text, device, autocast(device, dtype))
                write_json(header_path, self.header)
        self.states = np.memmap(path, dtype=np.float16, mode="r", shape=shape)

    @staticmethod
    @torch.no_grad()
    def write(path: Path, shape, teacher, text, device, precision, rows: int = 32) -> None:
        """Run the teacher's body over all windows. Raises ValueError for too small a disk."""
        size, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if size > 0.9 * free:
            raise ValueError(
                f"the teacher's cache needs {size / 1e6:,.0f} MB at {path}, {free / 1e6:,.0f} MB "
                "are free: make room, or leave out --cache_teacher"
            )
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            bar = tqdm(
                total=shape[0] * shape[1], desc=f"cache, {size / 1e6:,.0f} MB", unit="tokens",
                unit_scale=True,
            )  # fmt: skip
            with bar:
                for start in range(0, shape[0], rows):
                    chosen = np.arange(start, min(start + rows, shape[0]))
                    input_ids, _ = text.take(chosen)
                    with precision:
                        hidden = teacher.model(input_ids.to(device))
                    hidden.cpu().to(torch.float16).numpy().tofile(file)
                    bar.update(input_ids.numel())

    def take(self, windows: np.ndarray) -> Tensor:
        """Hidden states of those windows: (B, S, D) float32."""
        return torch.from_numpy(self.states[windows]).float()
