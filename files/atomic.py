"""Files that are either whole or absent: atomic writes, JSON, hashes.

A file is written under a temporary name in its own folder, flushed to disk and renamed: a reader,
or a run that resumes after a crash, sees the old content or the new, never half of it.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What torch.save and safetensors say instead of OSError where a disk is full.
WRITE_FAILED = ("inline_container", "PytorchStreamWriter", "I/O error")


@contextmanager
def atomic_path(path) -> Iterator[Path]:
    """`with atomic_path(p) as temporary:` `temporary` becomes `p` if nothing failed. Raises OSError
    naming `p` where the disk does not take it; what was at `p` is then unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        move(temporary, path)
    except Exception as error:
        if not isinstance(error, OSError) and not any(x in str(error) for x in WRITE_FAILED):
            raise
        reason = str(error).splitlines()[0]
        cure = "make room on its disk, or choose another; what was there before is unchanged"
        raise OSError(f"{path} could not be written ({reason}): {cure}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, last: str) -> Iterator[Path]:
    """`with atomic_folder(f, last) as new:` the files of `new`, f/new, replace those of the same
    names in `f` if nothing failed. The one named `last` does so last: without it `f` is not whole,
    and as long as there is f/new, it is ours."""
    new = folder / "new"
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    (folder / last).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        move(path, folder / path.name)
    new.rmdir()


def move(source: Path, target: Path) -> None:
    """Rename, so that it lasts through a power cut; Windows has no call for that."""
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path, value) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path) -> dict:
    """Read a JSON object. Raises ValueError naming the file where it is not one."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    return parse_json(Path(path).read_bytes(), path)


def parse_json(text: bytes, where) -> dict:
    """The JSON object that `text` is. Raises ValueError naming `where`, a file or a line of one."""
    try:
        value = json.loads(text.decode("utf-8"))
        if b"\\ud" in text.lower():  # half of a surrogate pair is not text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): mend or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not a {type(value).__name__}")
    return value


def file_hash(path, size: float = math.inf) -> str:
    """sha256 of the first `size` bytes of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(1 << 24, size)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def tokenizer_hash(folder) -> str:
    """sha256 of the folder's tokenizer.json: two models share a tokenizer if it is equal."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer in '{folder}': copy in the one its model was trained with")
    return file_hash(path)


def copy_tokenizer(source, folder) -> None:
    """Copy tokenizer.json, and its configuration if there is one, to another folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(source) / name).is_file() and Path(source).resolve() != Path(folder).resolve():
            with atomic_path(Path(folder) / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)
