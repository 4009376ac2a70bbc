"""What --data names, opened: packed text of a prepared folder, or conversations of a jsonl."""

from pathlib import Path

from model import PRESETS, layers_named

from .chat import ChatData
from .packing import PackedText


def add_data_flags(parser, data: str = "out/data") -> None:
    """Add --data, --data_share, --skip_bad and --tokenizer."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default=data, help="folder of dataset.prepare, or a jsonl of conversations")
    add("--data_share", type=float, default=1.0, help="first part of the text, as a share of it")
    add("--skip_bad", action="store_true", help="leave out bad lines of a jsonl, and count them")
    add("--tokenizer", default="out/data", help="folder of one, for a jsonl and new models")


def open_data(args, *models: str | None) -> PackedText | ChatData:
    """The data that `args` names; a jsonl is read with the tokenizer of the first of `models`,
    the run's checkpoints and presets, that is a folder. Raises ValueError for bad data."""
    if not str(args.data).endswith(".jsonl"):
        return PackedText(args.data, "train", args.seq_len, args.data_share)
    if args.data_share != 1.0:
        raise ValueError("--data_share is of a prepared folder: leave it out for a jsonl")
    models = [args.teacher if layers_named(x) and "teacher" in args else x for x in models]
    folders = [name for name in models if name and name not in PRESETS and Path(name).is_dir()]
    data = ChatData(
        args.data, (folders or [args.tokenizer])[0], "train", args.seq_len,
        answers_only=getattr(args, "answers_only", False), skip_bad=args.skip_bad,
    )  # fmt: skip
    print(f"{args.data}: {data.size} conversations, {data.cut} cut to {args.seq_len} tokens")
    return data
