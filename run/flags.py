"""The flags that all training scripts share, named and explained once; their ranges stand in
files/command.py."""

from argparse import ArgumentParser, BooleanOptionalAction
from contextlib import suppress
from pathlib import Path

from files import check_ranges, read_json
from model.config import PRESETS
from model.prune import layers_named
from model.stored import DTYPES

from . import parallel

FINE_TUNING, TIMES_WIDTH = 2e-5, 0.2  # peak rates, see choose_optimizer


class DefaultRate(float):
    """A learning rate that nobody typed: the one of a new model."""


def add_common_flags(
    parser: ArgumentParser, *, out: str, pair: bool = False, fused: bool = True, **defaults
) -> None:
    """Add --out and the flags of optimisation and running; `defaults` overrides values.
    pair: also --teacher and --student, as most methods have them. fused: also --fused."""
    if pair:
        add = parser.add_argument_group("models").add_argument
        add("--teacher", default="out/teacher", help="checkpoint folder")
        what = "preset (nano, ...), checkpoint folder, or layers:N, that many of the teacher's"
        add("--student", default="nano", help=what)
        add_teacher_dtype(parser)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, default=Path(out), help="folder that the run writes")
    add("--seed", type=int, default=0, help="of weights and batch order")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 where the machine has it")
    add("--compile", action=BooleanOptionalAction, default=False, help="slow start, faster steps")
    if fused:
        when = "never hold all logits of a batch; auto: where they would take more than 256 MB"
        add("--fused", choices=("auto", "yes", "no"), default="auto", help=when)
    add("--fsdp", action="store_true", help="with torchrun: shard the models over the processes")
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    group = parser.add_argument_group("optimisation")
    add = group.add_mutually_exclusive_group().add_argument
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--flops", type=float, help="instead of --steps: floating-point operations to spend")
    add("--seconds", type=float, help="instead of --steps: time to spend")
    add = group.add_argument
    add("--batch_size", type=int, default=16, help="sequences of a step, over all processes")
    add("--seq_len", type=int, default=128, help="tokens of a sequence (the most, for chat)")
    parts = "parts of a batch, computed one by one in less memory; at most --batch_size"
    add("--accumulation_steps", type=int, default=1, help=parts)
    muon = "muon: Muon for hidden matrices, AdamW for the rest; auto: muon where the model is new"
    add("--optimizer", default="auto", choices=("auto", "muon", "adamw"), help=muon)
    rate = DefaultRate(defaults.pop("learning_rate", 0.012))
    peak = "peak rate, less by default where the student is a folder (docs/glossary.md)"
    add("--learning_rate", type=float, default=rate, help=peak)
    add("--warmup", type=int, default=50, help="steps of linear warm-up")
    add("--weight_decay", type=float, default=0.1, help="of matrices")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0: not clipped")
    nonfinite = "at a loss or gradient of inf or nan: stop, or skip at most 10 batches in a row"
    add("--on_nonfinite", choices=("stop", "skip"), default="stop", help=nonfinite)
    add("--eval_every", type=int, default=100, help="steps between evaluations")
    last = "held-out sequences of the last evaluation; earlier ones take at most 100 of them"
    add("--final_eval", type=int, default=400, help=last)
    add("--patience", type=int, default=0, help="most evaluations without a better loss; 0: any")
    parser.set_defaults(**defaults)


def add_teacher_dtype(parser: ArgumentParser) -> None:
    """Add --teacher_dtype, for a command that has --teacher."""
    kept = "how its weights are kept: bfloat16 takes half the memory, int8 about a quarter"
    parser.add_argument("--teacher_dtype", choices=tuple(DTYPES), default="float32", help=kept)


def choose_optimizer(args, student: str | None, width: int) -> None:
    """Settle --optimizer and --learning_rate where nobody typed them. A folder's weights are to
    keep what they know: AdamW at FINE_TUNING, or where a run here made them at a rate that goes
    with 1 / width (Yang et al. 2022, 2203.03466), but not above the one that they were made at.
    The latter rate is also that of "layers:N", whose layers have to learn to do without others: of
    15 of SmolLM2's 30, after 16 steps of 256 tokens of Python's documentation, the loss was 6.8
    nats at 0.2 / width, 6.7 at 0.001, 7.7 at 0.0001 and 9.5 at 2e-5 (from 12.2, one seed)."""
    is_new, rate = student is None or student in PRESETS, args.learning_rate
    if isinstance(rate, DefaultRate) and layers_named(student) is not None:
        rate = float(f"{TIMES_WIDTH / width:.2g}")
    elif not is_new and isinstance(rate, DefaultRate):
        rate, record = FINE_TUNING, Path(student.removesuffix("/best"), "run.json")
        with suppress(OSError, ValueError):  # none, or none of ours
            before = read_json(record, args=dict)["args"].get("learning_rate")
            if type(before) is float and before > 0:
                rate = min(float(f"{TIMES_WIDTH / width:.2g}"), before)
    if args.optimizer == "auto":
        args.optimizer = "muon" if is_new else "adamw"
    args.learning_rate = float(rate)
    if not is_new:
        print(f"{student}: learns by {args.optimizer} at rate {rate:g} from what its weights know")


def check_flags(args) -> None:
    """Raise ValueError, naming the flag, for what cannot work, alone or together."""
    check_ranges(args)
    if args.accumulation_steps > args.batch_size:
        parts = f"--accumulation_steps {args.accumulation_steps} cannot cut a batch of"
        raise ValueError(f"{parts} {args.batch_size} sequences: lower it or raise --batch_size")
    processes = parallel.world_size()
    if processes > args.batch_size:
        few = f"{processes} processes cannot share a batch of {args.batch_size} sequences"
        raise ValueError(f"{few}: raise --batch_size, or lower torchrun's --nproc_per_node")
    if args.fsdp and processes == 1:
        start = "start two or more with torchrun --nproc_per_node=2 and the rest of this command"
        raise ValueError(f"--fsdp shards the models over several processes: {start}")
    if args.fsdp and (dtype := getattr(args, "teacher_dtype", "float32")) != "float32":
        raise ValueError(f"--fsdp shards weights of float32: leave --teacher_dtype {dtype} out")
