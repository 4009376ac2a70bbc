"""Held-out loss of a model, and how close it is to its teacher.

    python -m eval.perplexity --model out/student
    python -m eval.perplexity --model out/student --teacher out/teacher

Prints the loss in nats per token, perplexity, bits per byte and expected calibration error; with
--teacher also the mean KL(teacher || student) at T = 1 and the share of tokens on which both rank
the same token first. run/evaluation.py defines them.
"""

import argparse

from dataset.packing import PackedText
from files import check_ranges, command_line, new_parser
from model import load_for
from model.device import choose_device, keep_freed_memory
from run import evaluate


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="out/student", help="checkpoint folder")
    parser.add_argument("--teacher", default=None, help="checkpoint folder to compare with")
    parser.add_argument("--data", default="out/data", help="folder made by dataset.prepare")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a window")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args)
    keep_freed_memory()
    device = choose_device(args.device)
    text = PackedText(args.data, "val", args.seq_len)
    models = [load_for(name, text, device) for name in (args.model, args.teacher) if name]
    batches = text.evaluation(32, text.size)
    metrics = evaluate(models[0], batches, text.bytes_per_token, *models[1:])
    print(f"{args.model} on {text.size * args.seq_len:,} held-out tokens of {args.data}")
    for name, value in metrics.items():
        print(f"{name:>15} {value:10.4f}")
    return metrics


if __name__ == "__main__":
    command_line(main, parse_args())
