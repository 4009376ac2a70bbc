"""Pay the teacher once: write what it says about every training window to a file.

    python -m dataset.cache_teacher --teacher out/teacher               # out/teacher/sample.cache
    python train_distillation.py --teacher_cache out/teacher/sample.cache

Students of one teacher read the same windows whatever their seed, alpha or learning rate, and the
teacher says the same about them every time. What to keep of it, for each token:

    topk     the k largest probabilities, and the mass of all others as one tail bucket. The KL
             knows nothing about the inside of the tail, so its gradient there is wrong: it only
             scales the student's own guess. Cheap, and at a large vocabulary so biased that 64
             numbers teach less than 4 of a sample (eval/experiments/cache.py).
    sample   k tokens drawn so that the gradient is right on average (after sparse logit sampling,
             Anshumann et al. 2025, 2503.16870). Cheap, unbiased, noisy.
    full     all V log-probabilities. Exact up to float16, at every temperature. Large.
    hidden   the last hidden state, E numbers: logits = hidden @ head.T is one matrix product.
             Exact up to float16, at every temperature; small where the teacher is narrow.

topk and sample hold for the one --temperature they were made at. The file is written under a
temporary name; a call that was stopped goes on where it was. Shapes: N tokens, V vocabulary.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import load_model
from run.files import Finished, command_line, hold, release, sync_folder, write_json
from run.flags import check_ranges, new_parser
from run.setup import autocast, choose_device, keep_freed_memory

from .cache_file import (
    HEADER_BYTES,
    METHODS,
    SPARSE,
    header_bytes,
    read_header,
    record_dtype,
    source_hashes,
)
from .packing import PackedText
from .tokenizer import tokenizer_hash

ROWS = 32  # windows of one teacher pass
SYNCED = 64 * ROWS  # windows between two syncs to the disk


def top_k(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids and log_probs (N, k) of the k likeliest tokens, and the log of all others' mass (N,)."""
    kept, ids = log_probs.topk(k, dim=-1)
    others = log_probs.scatter(-1, ids, -torch.inf)
    return ids, kept, others.logsumexp(-1)


def sample(log_probs: Tensor, k: int, generator: torch.Generator):
    """k tokens and weights (N, k), so that E[weight of v] = p_v; and the entropy (N,).

    Tokens likelier than a threshold t are kept with their own p. Any other is kept with
    probability p / t, and then stands for t: p / t * t = p on average. t is such that k are kept.
    The draw is systematic (Madow 1949): marks at t * (u + 0, 1, 2, ...) on the tokens laid end to
    end, with one u a row; so the weights sum to 1 exactly, and vary less than independent draws
    from p (the paper's), which need several slots for a likely token.
    """
    probs = log_probs.double().exp()  # float32 cumulative sums are off by more than a rare token
    top, top_ids = probs.topk(k, dim=-1)
    left = (1 - top.cumsum(-1) + top).clamp(min=0)  # mass from the j-th likeliest on
    slots = torch.arange(k, 0, -1, device=probs.device)  # places from the j-th on
    sure = top * slots > left  # likelier than what is left would give each place
    sure = sure.cumprod(-1).bool()
    count = sure.sum(-1, keepdim=True)  # (N, 1) tokens that are kept for certain
    rest = probs.scatter(-1, top_ids, torch.where(sure, 0.0, top))
    line = rest.cumsum(-1)
    threshold = line[:, -1:] / (k - count).clamp(min=1)
    start = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=probs.dtype)
    marks = (start + torch.arange(k, device=probs.device) - count) * threshold
    drawn = torch.searchsorted(line, marks, right=True).clamp(max=probs.shape[-1] - 1)
    # The first `count` places are the sure ones, the others the drawn.
    ids = torch.where(sure, top_ids, drawn)
    weights = torch.where(sure, top, threshold.expand_as(top))
    entropy = -torch.xlogy(probs, probs).sum(-1)
    return ids, weights.log(), entropy


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--teacher", default="out/teacher", help="checkpoint folder")
    parser.add_argument("--data", default="out/data", help="folder made by dataset.prepare")
    parser.add_argument(
        "--out", type=Path, default=None, help="file to write [TEACHER/METHOD.cache]"
    )
    parser.add_argument(
        "--method", choices=METHODS, default="sample", help="what to keep of a token"
    )
    parser.add_argument("--k", type=int, default=64, help="of topk and sample: numbers a token, 1+")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of topk and sample: 0.001 to 1000"
    )
    parser.add_argument("--seq_len", type=int, default=128, help="as the students will train, 2+")
    parser.add_argument(
        "--data_share", type=float, default=1.0, help="first part of the text, above 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of method sample, 0 or more")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the teacher"
    )
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args)
    keep_freed_memory()
    device = choose_device(args.device)
    text = PackedText(args.data, "train", args.seq_len, args.data_share)
    teacher = load_model(args.teacher, device)
    if tokenizer_hash(args.teacher) != text.meta["tokenizer_sha256"]:
        raise ValueError(
            f"the tokenizer of teacher {args.teacher} is not the one of {args.data}: prepare the "
            f"data with it: python -m dataset.prepare --tokenizer {args.teacher}"
        )
    sparse = args.method in SPARSE
    if sparse and not 1 <= args.k <= text.vocab_size:
        raise ValueError(f"--k {args.k} must be between 1 and the vocabulary, {text.vocab_size}")
    header = {
        "format": "minidistill teacher cache 1",
        "method": args.method,
        "k": args.k if sparse else 0,
        "temperature": args.temperature if sparse else 1.0,
        "seed": args.seed if args.method == "sample" else 0,
        "seq_len": args.seq_len,
        "windows": text.size,
        "vocab_size": text.vocab_size,
        "teacher_width": teacher.config.hidden_size,
        "dtype": args.dtype,
        **source_hashes(args.teacher, text),
    }
    path = args.out or Path(args.teacher) / f"{args.method}.cache"
    hold(path)
    if path.exists():
        if read_header(path) == header:
            raise Finished(f"{path}: finished already")
        raise ValueError(
            f"{path} holds another cache (its header says how it was made): delete it or pass "
            "another --out"
        )
    begun = time.perf_counter()
    write(path, header, teacher, text, device, args.dtype)
    record = {
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "header": header,
        "bytes_per_token": record_dtype(header).itemsize / args.seq_len,
        "seconds": round(time.perf_counter() - begun, 2),
    }
    write_json(path.with_name(path.name + ".finished.json"), record)
    release(path)
    return record


def write(path: Path, header: dict, teacher, text, device, dtype: str) -> None:
    """Run the teacher over all windows; raises ValueError for too small a disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = record_dtype(header)
    partial = path.with_name(path.name + ".partial")
    first, beginning = 0, header_bytes(header)
    with open(partial, "ab+") as file:
        file.seek(0)
        if file.read(HEADER_BYTES) == beginning:  # the same call was stopped: go on
            first = trusted((partial.stat().st_size - HEADER_BYTES) // layout.itemsize)
            file.truncate(HEADER_BYTES + first * layout.itemsize)
        else:
            file.truncate(0)
            file.write(beginning)
            file.flush()
        size = (header["windows"] - first) * layout.itemsize
        print(
            f"{path}: {header['windows']:,} windows, {layout.itemsize / text.seq_len:,.0f} bytes "
            f"a token, {size / 1e6:,.0f} MB to write"
        )
        free = shutil.disk_usage(path.parent).free
        if size > 0.95 * free:
            raise ValueError(
                f"the cache needs {size / 1e6:,.0f} MB more at {path}, {free / 1e6:,.0f} MB are "
                "free: make room, or lower --k or --data_share"
            )
        bar = tqdm(
            total=header["windows"] * text.seq_len, initial=first * text.seq_len, desc=path.name,
            unit="tokens", unit_scale=True,
        )  # fmt: skip
        with bar:
            for start in range(first, header["windows"], ROWS):
                windows = np.arange(start, min(start + ROWS, header["windows"]))
                input_ids, _ = text.take(windows)
                fields = teacher_says(teacher, input_ids.to(device), header, dtype, start)
                records = np.empty(len(windows), layout)
                for name, values in zip(layout.names, fields, strict=True):
                    records[name] = values.cpu().numpy().reshape(records[name].shape)
                records.tofile(file)
                bar.update(input_ids.numel())
                if (start + len(windows)) % SYNCED == 0:
                    sync(file)
        sync(file)
    partial.replace(path)
    sync_folder(path.parent)


def trusted(windows: int) -> int:
    """How many of the windows in a partial file are on the disk, whatever ended its writer.

    After a power cut a file may be as long as it was and hold zeros. But what was written after a
    sync proves that the sync ended: everything before it is there. The rest is computed again, and
    passes of the same windows give the same bits.
    """
    return max(0, windows - 1) // SYNCED * SYNCED


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@torch.no_grad()
def teacher_says(teacher, input_ids: Tensor, header: dict, dtype: str, start: int) -> tuple:
    """The fields of a record for windows (B, S), each with B * S rows."""
    device = input_ids.device
    with autocast(device, dtype):
        hidden = teacher.model(input_ids)
        if header["method"] == "hidden":
            return (hidden.half().flatten(0, 1),)
        logits = teacher.lm_head(hidden).float().flatten(0, 1)
    log_probs = (logits / header["temperature"]).log_softmax(-1)
    if header["method"] == "full":
        return (log_probs.half(),)
    if header["method"] == "topk":
        return top_k(log_probs, header["k"])
    # One generator a pass: a call that goes on draws what the stopped one would have drawn.
    generator = torch.Generator(device).manual_seed(header["seed"] * 2**32 + start)
    return sample(log_probs, header["k"], generator)


if __name__ == "__main__":
    command_line(main, parse_args())
