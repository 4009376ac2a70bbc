"""Locks: two processes never write one run's folder, or one growing file, at the same time.

The system gives a lock back when its process ends, even by SIGKILL.
"""

from pathlib import Path

from filelock import FileLock, Timeout

held: dict[str, FileLock] = {}


class Locked(ValueError):
    """Another process holds what this one asked for."""


def lock_path(path) -> str:
    return str((Path(path).parent / f".{Path(path).name}.lock").resolve())


def lock(path, wait: bool = False) -> None:
    """Keep other processes from `path` until `unlock`; locking twice is no error. wait: until it
    is free. Raises Locked, a ValueError, where another process has it."""
    name = lock_path(path)
    if name not in held:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
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
