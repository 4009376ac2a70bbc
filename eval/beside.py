"""Where an evaluation writes: beside a model that was trained here, or where --out says."""

from pathlib import Path

from files import check_apart


def settle_out(args, name: str) -> None:
    """Make args.out a file: `name` in the folder args.model unless it is given. Raises ValueError
    where that folder is someone else's, or where --out would replace what is not to be replaced
    (--overwrite)."""
    folder, inside = Path(args.model), args.out is None
    if inside and folder.is_dir() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is not a model that was trained here: name a file with --out")
    args.out = args.out or folder / name
    check_apart(args, presets=(args.model,) if inside else (), is_folder=False)
    if args.out.exists() and not (inside or args.overwrite):
        raise ValueError(f"{args.out} exists: pass --overwrite to replace it, or another --out")
