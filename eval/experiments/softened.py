"""A teacher whose logits are divided by T: the same ranking of tokens, another confidence.

    python -m eval.experiments.softened --teacher out/teacher --temperature 2 --out out/softened

The last norm's weights are divided by T, and so are all logits. Nothing is trained.
"""

from pathlib import Path

from files import (
    Finished,
    check_apart,
    check_free,
    check_ranges,
    command_line,
    hashes,
    lock,
    new_parser,
    write_json,
)
from model import load_model, save_model, weights_hash
from model.checkpoint import checkpoint_files


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--teacher", default="out/teacher", help="checkpoint folder")
    parser.add_argument("--temperature", type=float, default=2.0, help="T")
    parser.add_argument("--out", type=Path, default=Path("out/softened"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="leave a finished one as it is")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    return parser.parse_args(argv)


def main(args) -> None:
    check_ranges(args)
    check_apart(args)
    lock(args.out)
    check_free(args.out, ("run.json", "config.json"), args.overwrite)
    if (args.out / "run.json").is_file() and not args.overwrite:
        if args.resume:
            raise Finished(f"{args.out}: finished already")
        raise ValueError(f"{args.out} holds a model: pass --overwrite, or another --out")
    model = load_model(args.teacher).requires_grad_(False)
    model.model.norm.weight.div_(args.temperature)
    save_model(model, args.out, args.teacher)
    flags = {name: value for name, value in vars(args).items() if name != "out"}
    made_from = hashes(*checkpoint_files(args.teacher))
    sources = {"teacher_sha256": [weights_hash(args.teacher)]}
    record = {"args": flags, "made_from": made_from, "sources": sources, "device": ""}
    record |= {"parameters": model.num_parameters(), "tokens": 0, "seconds": 0.0, "flops": 0.0}
    write_json(args.out / "run.json", record)


if __name__ == "__main__":
    command_line(main, parse_args())
