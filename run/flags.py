"""The flags that all three training scripts share, named and explained once."""

import argparse
from pathlib import Path


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help shows a file's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_common_flags(parser: argparse.ArgumentParser, *, out: str, **defaults) -> None:
    """Add --out and the flags of data, optimisation and running; `defaults` overrides values."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path(out), help="folder that the run writes")
    group.add_argument("--seed", type=int, default=0, help="of weights and batch order, 0 or more")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the forward pass; auto measures which is faster here",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the models; left out, where a run is long enough for it to pay",
    )
    group.add_argument(
        "--fsdp", action="store_true", help="with torchrun: shard the models over the processes"
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in --out")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=int, default=1000, help="optimizer steps, 1 or more")
    group.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="sequences of one optimizer step, over all processes, 1 or more",
    )
    group.add_argument(
        "--seq_len", type=int, default=128, help="tokens of a sequence (the most, for chat), 2+"
    )
    group.add_argument(
        "--accumulation_steps",
        type=int,
        default=1,
        help="parts that a process cuts its rows into: the same in less memory, 1 to batch_size",
    )
    group.add_argument(
        "--optimizer",
        default="muon",
        choices=("muon", "adamw"),
        help="muon: Muon for the hidden matrices, AdamW for the rest; adamw: AdamW for all",
    )
    group.add_argument("--learning_rate", type=float, default=0.012, help="peak rate, above 0")
    group.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up, 0 or more")
    group.add_argument("--weight_decay", type=float, default=0.1, help="of matrices, 0 or more")
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest norm; 0 is off")
    group.add_argument(
        "--on_nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="what a loss or gradient of inf or nan does; skip leaves out at most 10 in a row",
    )
    group.add_argument("--eval_every", type=int, default=100, help="steps between evaluations, 1+")
    group.add_argument(
        "--final_eval", type=int, help="held-out windows or conversations of the last evaluation"
    )
    group.add_argument(
        "--patience",
        type=int,
        default=0,
        help="stop after this many evaluations without a better held-out loss; 0 is off",
    )
    parser.set_defaults(**defaults)


# flag: (smallest, largest)
RANGES = {
    "seed": (0, 2**31),
    "steps": (1, 10**9),
    "batch_size": (1, 2**20),
    "seq_len": (2, 2**20),
    "accumulation_steps": (1, 2**20),
    "learning_rate": (1e-12, 100.0),
    "warmup": (0, 10**9),
    "weight_decay": (0.0, 100.0),
    "grad_clip": (0.0, 1e9),
    "eval_every": (1, 10**9),
    "final_eval": (1, 10**9),
    "patience": (0, 10**9),
    "alpha": (0.0, 1.0),
    "temperature": (1e-3, 1e3),
    "data_share": (1e-6, 1.0),
    "k": (1, 2**20),
    "tag_weight": (0.0, 1e6),
    "think_weight": (0.0, 1e6),
    "answer_weight": (0.0, 1e6),
}


def check_ranges(args) -> None:
    """Raise ValueError, naming the flag and its range, for a value outside it."""
    for name, value in vars(args).items():
        if name in RANGES and value is not None:
            low, high = RANGES[name]
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"--{name} {value} must be between {low:g} and {high:g}")


def check_flags(args) -> None:
    """Raise ValueError for flags of a training run that cannot work, alone or together."""
    check_ranges(args)
    if args.accumulation_steps > args.batch_size:
        raise ValueError(
            f"--accumulation_steps {args.accumulation_steps} cannot cut a batch of "
            f"{args.batch_size} sequences: lower it or raise --batch_size"
        )
