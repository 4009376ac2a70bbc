"""Stage 1: pretrain a language model on text, by cross-entropy. Makes teachers and plain students.

    loss = -mean over tokens of log softmax(logits)[next token]

A Transformer reads a window of S tokens and says, at every position, how likely each token of the
vocabulary is to come next. The loss is how surprised it was by what came, in nats a token.

    python -m dataset.prepare                                  # once: tokenizer and token streams
    python train_pretrain.py                                   # the teacher: 1M parameters
    python train_pretrain.py --model nano --out out/plain      # a plain student: 0.2M parameters

The first takes about 2.5 minutes on two cores, the second 45 seconds. Next: train_distillation.py.
Shapes: B batch, S sequence, V vocabulary.
"""

import torch
from torch import Tensor

from dataset.packing import PackedText
from distill import weighted_cross_entropy
from eval.metrics import evaluate
from model import make_or_load, save_model
from run import (
    Ahead,
    Optimizer,
    Run,
    autocast,
    command_line,
    microbatches,
    place,
    settle_speed,
    setup,
)
from run.flags import add_common_flags, new_parser

EVAL = 100  # held-out windows of the evaluations during training


def compute_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, a scalar: logits (B, S, V), labels (B, S)."""
    return weighted_cross_entropy(logits, labels)


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model",
        default="mini",
        help="nano 0.2M, micro 0.5M, mini 1M, midi 2.4M, small 5M, base 26M, large 104M, "
        "or a checkpoint folder to train on",
    )
    parser.add_argument("--data", default="out/data", help="folder made by dataset.prepare")
    parser.add_argument(
        "--data_share", type=float, default=1.0, help="first part of the text to use, above 0 to 1"
    )
    add_common_flags(parser, out="out/teacher", final_eval=400)
    return parser.parse_args(argv)


def main(args) -> dict:
    # 1. Setup: flags, seed, device, precision.
    device = setup(args)
    # 2. Data: windows of one long token stream; whole documents are held out.
    text = PackedText(args.data, "train", args.seq_len, args.data_share)
    held_out = PackedText(args.data, "val", args.seq_len)
    batch_of = Ahead(lambda step: text.batch(step, args.batch_size, args.seed), args.steps, device)
    # 3. Model.
    student = place(make_or_load(args.model, text.vocab_size), device, args)
    settle_speed(args, device, student)
    forward, loss_of = student, compute_loss
    if args.compile:
        forward, loss_of = torch.compile(student), torch.compile(compute_loss)
    # 4. Optimizer: Muon and AdamW; the schedule is warm-up and cosine.
    optimizer = Optimizer(student, args)
    # 5. Resume, if asked to: weights, optimizer and step return to where they were.
    run = Run(args, student, optimizer, device, lambda out: save_model(student, out, args.data))
    # 6. Train.
    for step in run.steps():
        input_ids, labels = batch_of(step)  # (B, S) each
        valid = torch.ones_like(labels, dtype=torch.float32)
        loss = torch.zeros((), device=device)
        for ids, targets, share in microbatches(
            (input_ids, labels), valid, args.accumulation_steps
        ):
            with autocast(device, args.dtype):
                logits = forward(ids.to(device, non_blocking=True))  # (B, S, V)
            part = share * loss_of(logits, targets.to(device, non_blocking=True))
            part.backward()
            loss += part.detach()
        if run.update(loss, labels.numel(), input_ids):
            batches = held_out.evaluation_batches(args.batch_size, EVAL)
            run.evaluated(evaluate(student, batches)["val_loss"])
    # 7. Evaluate on more of what is held out, and save.
    batches = held_out.evaluation_batches(args.batch_size, args.final_eval)
    metrics = evaluate(student, batches, held_out.bytes_per_token)
    return run.finish(student.config.to_json(), metrics)


if __name__ == "__main__":
    command_line(main, parse_args())
