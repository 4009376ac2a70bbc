"""Files that are either whole or absent: atomic writes, JSON.

A file is written under a temporary name in its own folder, flushed to disk and renamed: a reader,
or a run that resumes after a crash, sees the old content or the new, never half of it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".minidistill-unfinished"  # no name that a user's own folder may have
# Where Hugging Face keeps its templates, the names of its tokens, and those that end a turn.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("chat_template.jinja", "generation_config.json")
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
def atomic_folder(folder: Path, last: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """`with atomic_folder(f, last) as new:` the files of `new`, f/UNFINISHED, replace those of the
    same names in `f` if nothing failed; of those named in `stale` the ones go that `new` has not,
    for they would be read along. The one named `last` moves last: without it `f` is not whole, and
    as long as there is f/UNFINISHED, it is ours."""
    new = folder / UNFINISHED
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    for name in (last, *(name for name in stale if not (new / name).exists())):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        move(path, folder / path.name)
    new.rmdir()


def terms_in(folder) -> list[Path]:
    """The licence that lies in a folder, and its notices."""
    return sorted(p for name in ("LICENSE*", "NOTICE*") for p in Path(folder).glob(name))


def copy_terms(source, folder) -> None:
    """Copy them: they go with the weights, wherever those go."""
    for path in terms_in(source):
        shutil.copyfile(path, Path(folder, path.name))


def of_model_in(folder: Path, mark: str) -> tuple[str, ...]:
    """The names of files in `folder` that would be taken for a new model's: those of a tokenizer
    and, where `mark` lies there, so that we made what is there, its terms."""
    terms = terms_in(folder) if (folder / mark).is_file() else []
    return (*TOKENIZER_FILES, *(path.name for path in terms))


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


def check_file(path, cure: str = "make it, or pass another", missing: str = "") -> Path:
    """`path`, which is a file. Raises ValueError (what is `missing`, and the cure) where nothing is
    there, or a folder or a pipe, from which a reader might wait for ever."""
    if not Path(path).is_file():
        fault = "is a folder, a pipe or a device" if Path(path).exists() else "does not exist"
        raise ValueError(f"{missing or f'{path} {fault}'}: {cure}")
    return Path(path)


def check_path(path, is_folder: bool) -> None:
    """Raise ValueError where something that is there keeps an output from being made at `path`."""
    path = Path(path)
    for place in (path, *path.parents):
        kind = "file" if place == path and not is_folder else "folder"
        if place.exists() and not (place.is_file() if kind == "file" else place.is_dir()):
            kept = f"{path} cannot be made: {place} is there and is no {kind}"
            raise ValueError(f"{kept}: pass another path")


def read_json(path, **kinds: type) -> dict:
    """Read a JSON object that has the keys of `kinds` (`check_keys`). Raises ValueError naming the
    file where it is not one."""
    return check_keys(parse_json(check_file(path).read_bytes(), path), path, **kinds)


def parse_json(text: bytes, where) -> dict:
    """The JSON object that `text` is. Raises ValueError naming `where`, a file or a line of one."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if b"\\ud" in text.lower():  # half of a surrogate pair is not text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): mend or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not a {type(value).__name__}")
    return value


def check_keys(value: dict, where, **kinds: type) -> dict:
    """`value`, whose keys of `kinds` have those types; int is a whole number, 0 or more."""
    for name, kind in kinds.items():
        found = value.get(name)
        if type(found) is not kind or (kind is int and found < 0):
            wrong = f"{name!r} is missing" if name not in value else f"{name!r} is {found!r:.60}"
            raise ValueError(f"{where} is damaged ({wrong}): make it again")
    return value


def tokenizer_paths(folder) -> list[Path]:
    """The files that say how a folder's model reads, talks and ends: TOKENIZER_FILES, as far as
    there are any."""
    return [path for name in TOKENIZER_FILES if (path := Path(folder, name)).is_file()]


def copy_tokenizer(source, folder) -> None:
    """Copy TOKENIZER_FILES, as far as there are any, to another folder; what is there of another
    tokenizer goes."""
    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)
        elif name != "tokenizer.json":
            (folder / name).unlink(missing_ok=True)
