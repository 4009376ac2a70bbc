"""An anytime decoder: each token leaves after the first layer whose exit is sure enough.

    python -m methods.self_distillation --student micro       # a model whose exits were trained
    python -m eval.anytime --model out/self_distillation
    python -m eval.anytime --model out/self_distillation --prompt "KING LEAR" --threshold 0.3

On held-out text, for each threshold of confidence (the largest probability of an exit):

    depth    mean number of layers that a token takes
    loss     nats per token, each token's at the exit that it leaves by
    mflop    millions of operations per token in layers and heads, 2 per weight: each exit that is
             asked costs a head, so a small model with a large vocabulary saves little or nothing

Threshold 0 is the first exit alone, threshold 1 the last one alone, which is the plain model. The
table is written as a CSV, too: beside a model that was trained here, or to --out.
Shapes: L layers, N tokens.
"""

import csv
from pathlib import Path

import torch

from dataset import PackedText
from dataset.tokenizer import decode, encode, load_tokenizer
from distill import cross_entropy
from eval.beside import settle_out
from files import atomic_path, check_ranges, command_line, new_parser, printable
from model import Record, load_for
from model.device import choose_device
from model.exits import exit_logits, first_sure, generate_early

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RANGES = {"threshold": (0.0, 1.0)}


@torch.inference_mode()
def ask_exits(model, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each exit and each label that is not -100 the confidence and the loss: (L, N) both."""
    confidences, losses = [], []
    for batch in batches:
        input_ids, labels = (x.to(model.lm_head.weight.device) for x in batch)
        record, valid = Record("hidden"), labels != -100
        model.model(input_ids, record=record)
        logits = [one[valid].float() for one in exit_logits(model, record.hidden[1:])]
        confidences.append(torch.stack([one.softmax(-1).max(-1).values for one in logits]))
        losses.append(torch.stack([cross_entropy(one, labels[valid]) for one in logits]))
    return torch.cat(confidences, dim=1), torch.cat(losses, dim=1)


def anytime_rows(model, batches) -> list[dict[str, float]]:
    """threshold, depth, loss and mflop for each of THRESHOLDS."""
    confidence, losses = ask_exits(model, batches)
    weights = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    rows = []
    for threshold in THRESHOLDS:
        taken = first_sure(confidence, threshold)  # (N,)
        depth = (taken + 1).double().mean().item()
        heads = 1.0 if threshold == 1 else depth  # nobody asks an exit that no token may take
        mflop = 2 * (depth * weights + heads * model.lm_head.weight.numel()) / 1e6
        loss = losses.gather(0, taken[None]).double().mean().item()
        rows.append({"threshold": threshold, "depth": depth, "loss": loss, "mflop": mflop})
    return rows


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--model", default="out/self_distillation", help="checkpoint folder")
    add("--data", default="out/data", help="folder made by dataset.prepare")
    add("--out", type=Path, default=None, help="CSV of the table; default MODEL/exits.csv")
    add("--overwrite", action="store_true", help="replace the file in --out")
    add("--seq_len", type=int, default=128, help="tokens of a window")
    add("--prompt", help="a text to continue instead, greedily")
    add("--threshold", type=float, default=0.5, help="of --prompt: the confidence to leave with")
    add("--max_new_tokens", type=int, default=60, help="of --prompt")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> list[dict[str, float]] | tuple[str, float]:
    check_ranges(args, **RANGES)
    text = PackedText(args.data, "val", args.seq_len)
    model = load_for(args.model, text, choose_device(args.device))
    if args.prompt is not None:
        tokenizer = load_tokenizer(args.model)
        prompt = encode(tokenizer, args.prompt)
        ids, depths = generate_early(model, prompt, args.max_new_tokens, args.threshold)
        depth = sum(depths) / max(1, len(depths))
        said = decode(tokenizer, ids)
        print(printable(args.prompt + said))
        print(f"{len(ids)} tokens, {depth:.2f} of {len(model.model.layers)} layers per token")
        return said, depth
    settle_out(args, "exits.csv")
    rows = anytime_rows(model, text.evaluation(32, text.size))
    with atomic_path(args.out) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{args.model} on {text.size * args.seq_len:,} held-out tokens of {args.data}")
    print("threshold  depth    loss  mflop")
    for row in rows:
        print("{threshold:9.1f} {depth:6.2f} {loss:7.4f} {mflop:6.2f}".format(**row))
    return rows


if __name__ == "__main__":
    command_line(main, parse_args())
