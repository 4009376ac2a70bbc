"""Held-out loss of a model, and how close it is to its teacher.

    python -m eval.perplexity --model out/student
    python -m eval.perplexity --model out/student --teacher out/teacher

Prints the loss in nats a token, perplexity, bits per byte and expected calibration error; with
--teacher also the mean KL(teacher || student) at T = 1 and the share of tokens on which both rank
the same token first. eval/metrics.py defines them.
"""

import argparse

from dataset.packing import PackedText
from dataset.tokenizer import tokenizer_hash
from eval.metrics import evaluate
from model import load_model
from run.files import command_line
from run.flags import new_parser
from run.setup import choose_device, keep_freed_memory


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="out/student", help="checkpoint folder")
    parser.add_argument("--teacher", default=None, help="checkpoint folder to compare with")
    parser.add_argument("--data", default="out/data", help="folder made by dataset.prepare")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a window, 2 or more")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> dict:
    keep_freed_memory()
    device = choose_device(args.device)
    if args.seq_len < 2:
        raise ValueError(f"--seq_len {args.seq_len} must be at least 2")
    text = PackedText(args.data, "val", args.seq_len)
    models = []
    for folder in filter(None, (args.model, args.teacher)):
        models.append(load_model(folder, device))
        if tokenizer_hash(folder) != text.meta["tokenizer_sha256"]:
            raise ValueError(
                f"the tokenizer of {folder} is not the one of {args.data}: evaluate it on data "
                f"prepared with: python -m dataset.prepare --tokenizer {folder}"
            )
    batches = text.evaluation_batches(32, text.size)
    metrics = evaluate(models[0], batches, text.bytes_per_token, *models[1:])
    print(f"{args.model} on {text.size * args.seq_len:,} held-out tokens of {args.data}")
    for name, value in metrics.items():
        print(f"{name:>15} {value:10.4f}")
    return metrics


if __name__ == "__main__":
    command_line(main, parse_args())
