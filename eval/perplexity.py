"""Held-out loss of a model, and how close it is to its teacher.

    python -m eval.perplexity --model out/student
    python -m eval.perplexity --model out/student --teacher out/teacher
    python -m eval.perplexity --model TEACHER --windows 50       # of a large model, an estimate

Prints the loss in nats per token, perplexity, bits per byte and expected calibration error; with
--teacher also the mean KL(teacher || student) at T = 1 and the share of tokens on which both rank
the same token first. run/evaluation.py defines them.
"""

import argparse
from collections.abc import Iterable, Iterator

from dataset.packing import PackedText
from files import check_ranges, command_line, new_parser
from files.progress import progress_bar
from model import load_for
from model.device import choose_device, keep_freed_memory
from run import evaluate

BATCH = 32  # windows of a forward pass
RANGES = {"windows": (1, 10**9)}


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__, **RANGES)
    parser.add_argument("--model", default="out/student", help="checkpoint folder")
    parser.add_argument("--teacher", default=None, help="checkpoint folder to compare with")
    parser.add_argument("--data", default="out/data", help="folder made by dataset.prepare")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a window")
    most = "how many held-out windows, spread evenly; default all"
    parser.add_argument("--windows", type=int, default=None, help=most)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def shown(batches: Iterable, bar) -> Iterator:
    """The same batches; the bar moves when one has been used."""
    for batch in batches:
        yield batch
        bar.update(len(batch[0]))


def main(args) -> dict:
    check_ranges(args, **RANGES)
    keep_freed_memory()
    device = choose_device(args.device)
    text = PackedText(args.data, "val", args.seq_len)
    models = [load_for(name, text, device) for name in (args.model, args.teacher) if name]
    windows = min(args.windows or text.size, text.size)
    with progress_bar(windows, "perplexity", unit="window") as bar:
        batches = shown(text.evaluation(BATCH, windows), bar)
        metrics = evaluate(models[0], batches, text.bytes_per_token, *models[1:])
    part = f"{windows * args.seq_len:,} held-out tokens ({windows:,} of {text.size:,} windows)"
    print(f"{args.model} on {part} of {args.data}")
    for name, value in metrics.items():
        print(f"{name:>15} {value:10.4f}")
    return metrics


if __name__ == "__main__":
    command_line(main, parse_args())
