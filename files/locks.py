"""Whose a place is: a command writes into what it made itself, into anything else that exists only
if it is told to, and never into what it reads. Two processes never write one place at a time.

The system gives a lock back when its process ends, even by SIGKILL.
"""

from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import check_path
from .command import NO_PATHS
from .origin import remember_hashes

held: dict[str, FileLock] = {}


def check_apart(args, presets=(), is_folder: bool = True, flag: str = "out") -> None:
    """Raise ValueError where --out (or `flag`) is, holds, or lies in what another flag names (but
    `presets`), symlinks followed, or that is what is written beside a file, OUT.*; or where
    something else than a folder, or than a file, is there already. Hashes are remembered beside
    --out from here on."""
    written = getattr(args, flag)
    out = Path(written).resolve()
    for name, value in vars(args).items():
        is_path = isinstance(value, (str, Path)) and value and str(value) not in presets
        if is_path and name not in (flag, *NO_PATHS) and Path(value).exists():
            read = Path(value).resolve()
            if out / "phases" in read.parents:  # this command made it (run/phases.py)
                continue
            beside = out.parent == read.parent and read.name.startswith(f"{out.name}.")
            if out in (read, *read.parents) or read in out.parents or (beside and not is_folder):
                place = f"--{flag} {written} would write where --{name} {value} is read"
                raise ValueError(f"{place}: pass another --{flag}, outside of it")
    check_path(written, is_folder)
    remember_hashes(out.parent)


def check_free(folder: Path, ours: tuple[str, ...], overwrite: bool) -> bool:
    """Whether `folder` holds one of the names in `ours`, as each folder of this command does.
    Raises ValueError where it holds files but none of those."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    is_ours = not names.isdisjoint(ours)
    if names and not is_ours and not overwrite:
        others = f"{folder} holds files that this command did not make ({min(names)})"
        raise ValueError(f"{others}: pass another --out, or --overwrite to write among them")
    return is_ours


class Locked(ValueError):
    """Another process holds what this one asked for."""


def lock_path(path) -> str:
    """One file for all paths to one place, symlinks included."""
    path = Path(path).resolve()
    return str(path.with_name(f".{path.name}.lock"))


def lock(path, wait: bool = False) -> None:
    """Keep other processes from `path` until `unlock`; locking twice is no error. wait: until it
    is free. Raises Locked, a ValueError, where another process has it."""
    name = lock_path(path)
    if name not in held:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        taken = FileLock(name)
        try:
            taken.acquire(timeout=-1 if wait else 0)
        except Timeout:
            in_use = f"{path} is in use by another process: wait for it, or pass another --out"
            raise Locked(in_use) from None
        held[name] = taken


def unlock(path) -> None:
    if lock_path(path) in held:
        held.pop(lock_path(path)).release()


def unlock_all() -> None:
    while held:
        held.popitem()[1].release()
