"""Files that are either whole or absent, and one way to report what a user got wrong.

A file is written to a temporary name in its own folder, flushed to disk, and renamed: a reader
(or a run that resumes after a crash) sees the old content or the new, never half of it.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import parallel

# What torch.save and safetensors say instead of OSError where a disk is full.
WRITE_FAILED = ("inline_container", "PytorchStreamWriter", "I/O error")
# What torch says where memory is, on a CPU and on a GPU.
NO_MEMORY = ("can't allocate memory", "out of memory")


@contextmanager
def atomic_path(path) -> Iterator[Path]:
    """`with atomic_path(p) as temporary:` `temporary` becomes `p` if nothing failed.

    Raises OSError naming `p` where the disk does not take it; what was at `p` is then unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        if isinstance(error, OSError) or any(words in str(error) for words in WRITE_FAILED):
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{path} could not be written ({reason}): make room on its disk, or choose "
                "another; what was there before is unchanged"
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut; Windows has no call for it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_hash(path) -> str:
    """sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


class InUse(ValueError):
    """Another process holds what this one asked for."""


held = []  # open files whose locks last until this process ends, however it ends


def hold(path, wait: bool = False) -> None:
    """Keep other processes from `path`, a run's folder or a file that grows, while this one lives.

    The system gives the lock back when the process ends, even by SIGKILL. wait: until it is free.
    Raises InUse, a ValueError, where another process has it. Holding twice is no error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = str((path.parent / f".{path.name}.lock").resolve())
    if any(file.name == name for file in held):
        return
    file = open(name, "a", encoding="utf-8")
    while not try_lock(file):
        if not wait:
            file.close()
            raise InUse(f"{path} is in use by another process: wait for it, or pass another --out")
        time.sleep(0.2)
    held.append(file)


def release(path) -> None:
    """Give back what `hold` took."""
    path = Path(path)
    name = str((path.parent / f".{path.name}.lock").resolve())
    for file in [file for file in held if file.name == name]:
        held.remove(file)
        file.close()


def release_all() -> None:
    """Give back all: a process that goes on to other work keeps others from none of it."""
    while held:
        held.pop().close()


def try_lock(file) -> bool:
    """Lock an open file for this process; False where another has it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def write_json(path, value) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path) -> dict:
    """Read a JSON object. Raises ValueError naming the file where it is not one."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): make it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def copy_tokenizer(source, folder) -> None:
    """Copy tokenizer.json, and its configuration if there is one, to another folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(source) / name).is_file() and Path(source).resolve() != Path(folder).resolve():
            with atomic_path(Path(folder) / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)


class Finished(Exception):
    """Raised where --resume finds nothing left to do."""


def printable(text: str) -> str:
    """Without control characters, which could otherwise command the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text)


def command_line(main, args=None) -> None:
    """Run `main(args)`; a user's mistake ends in one sentence on stderr and exit code 2.

    Of several processes the first one to fail prints it.
    """
    code, message = 0, None
    try:
        main(args)
    except Finished as reason:
        print(reason)
    except (ValueError, OSError) as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt as stop:
        code, message = 130, str(stop) or "stopped"
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            reason = (str(error) or "MemoryError").splitlines()[0][:200]
            cure = "lower --batch_size or --seq_len, raise --accumulation_steps, or take a smaller"
            code, message = 2, f"error: out of memory ({reason}): {cure} model"
        elif parallel.world_size() == 1:
            raise
        else:
            code, message = 1, traceback.format_exc()
    if message is not None and parallel.speaks():
        print(printable(message), file=sys.stderr)  # it may quote a stranger's file
    parallel.leave(code)
