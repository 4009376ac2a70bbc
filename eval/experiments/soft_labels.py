"""What a soft label looks like: the teacher's distribution for one real context at several T.

    python -m eval.experiments.soft_labels --preset quick

Picks the held-out context at which the teacher's entropy is closest to 2 nats among 200 fixed
windows: neither certain nor clueless. Rows hold its ten likeliest tokens and their probabilities.
"""

import torch

from dataset.packing import PackedText
from dataset.tokenizer import decode, load_tokenizer
from model import load_model

from .common import append_rows, experiment_main, read_rows, teacher_of
from .jobs import run_jobs

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
CONTEXT, TOP, ENTROPY = 24, 10, 2.0


@torch.no_grad()
def run(scale, results) -> None:
    path = results / "soft_labels" / "results.csv"
    if read_rows(path):
        return
    job = teacher_of(scale, 0)
    run_jobs([job])
    teacher, tokenizer = load_model(job.out), load_tokenizer(job.out)
    text = PackedText(scale.data, "val", scale.seq_len)
    input_ids, labels = next(text.evaluation(200, 200))
    position = scale.seq_len // 2
    logits = teacher(input_ids[:, : position + 1])[:, -1]  # (B, V)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    row = int((entropy - ENTROPY).abs().argmin())
    context = decode(tokenizer, input_ids[row, position + 1 - CONTEXT : position + 1].tolist())
    rows = []
    for temperature in TEMPERATURES:
        probabilities = (logits[row] / temperature).softmax(-1)
        entropy = float(-(probabilities * probabilities.clamp(min=1e-30).log()).sum())
        for rank, token in enumerate(logits[row].topk(TOP).indices.tolist(), start=1):
            rows.append({
                "experiment": "soft_labels", "arm": f"T={temperature:g}", "seed": 0,
                "teacher_params": teacher.num_parameters(), "temperature": temperature,
                "rank": rank, "token": decode(tokenizer, [token]),
                "probability": float(probabilities[token]), "entropy": entropy,
                "is_next": int(token == int(labels[row, position])),
                "context": context, "command": job.command,
            })  # fmt: skip
    append_rows(path, rows)
    print(f"{path}: written")


if __name__ == "__main__":
    experiment_main(__doc__, run)
