"""Lesson 1: pretrain a language model, by cross-entropy. Makes teachers and plain students.

    loss = -mean over tokens of log softmax(logits)[next token]

A Transformer reads a window of S tokens and says, at every position, how likely each token of the
vocabulary is to come next. The loss is how surprised it was by what came, in nats per token.

    The mean is over the tokens whose label is not -100: all of a text, the assistant's words of a
    conversation.

    python -m dataset.prepare                                  # once: tokenizer and token streams
    python train_pretrain.py                                   # the teacher: 1.05M parameters
    python train_pretrain.py --model nano --out out/plain      # a plain student: 0.23M
    python train_pretrain.py --data chats.jsonl --model out/student --out out/chat

Try: --learning_rate 0.1 (too fast), --data_share 0.1 (when does the held-out loss rise again?).
Next: train_distillation.py. Shapes: B batch, S sequence, N valid tokens, V vocabulary, D width.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import at_least_float32, fused_loss, use_fused
from run import Run, add_common_flags, command_line, new_parser


def compute_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token, a scalar, and its one part.

    logits (B, S, V), labels (B, S); -100 is ignored.
    """
    valid = labels != -100
    log_probs = at_least_float32(logits).log_softmax(-1)  # bfloat16 is too coarse
    chosen = log_probs.gather(-1, labels.masked_fill(~valid, 0)[..., None]).squeeze(-1)  # (B, S)
    ce = -torch.where(valid, chosen, 0.0).sum() / valid.sum().clamp(min=1)
    return ce, {"ce": ce}


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model",
        default="mini",
        help="nano 0.23M, micro 0.49M, mini 1.05M, midi 2.4M, small 5M (vocabulary 2,048), "
        "base 26M, large 104M (6,400); or a checkpoint folder to train on",
    )
    add_data_flags(parser)
    add_common_flags(parser, out="out/teacher")
    return parser.parse_args(argv)


def main(args) -> dict:
    run = Run(args)  # device, precision, seed
    data = open_data(args, args.model)
    student = run.student(args.model, data)
    fused = use_fused(args.fused, args.batch_size * args.seq_len, data.vocab_size)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            if fused:  # the same value, without the (B, S, V) logits
                logits = (student.model(input_ids), student.lm_head.weight)  # unmultiplied
                loss, parts = fused_loss(
                    compute_loss, logits, labels, weight=labels != -100, compiled=args.compile
                )
            else:
                logits = student(input_ids)  # (B, S, V)
                loss, parts = compute_loss(logits, labels)
        run.step(loss, **parts)  # backward, clip, update, log
    return run.finish()  # evaluate, save


if __name__ == "__main__":
    command_line(main, parse_args())
