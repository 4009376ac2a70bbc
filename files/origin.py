"""What a result was made from: the sha256 of every file that was read, and the commit of this code.

A hash is computed once, and again only where a file's size or one of its times has changed. Those
of large files outlive the process, in .hashes.json beside the outputs.
"""

import hashlib
import math
import subprocess
from contextlib import suppress
from pathlib import Path

from .atomic import check_file, read_json, write_json

LARGE = 1 << 26  # bytes: what is smaller is hashed in a tenth of a second
known: dict[str, str] = {}  # path, size and times of a file: sha256
memory: Path | None = None


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
    cure, missing = "copy in the one its model was trained with", f"no tokenizer in '{folder}'"
    return file_hash(check_file(Path(folder) / "tokenizer.json", cure, missing))


def remember_hashes(folder: Path) -> None:
    """Share hashes with later processes that write to `folder` too."""
    global memory
    memory = folder / ".hashes.json"
    with suppress(ValueError, OSError):  # none yet, or damaged: they are computed again
        known.update({k: v for k, v in read_json(memory).items() if isinstance(v, str)})


def known_hash(path, tail: int = 0) -> str:
    """sha256 of a file, without its last `tail` bytes."""
    about = Path(path).stat()
    size, times = about.st_size - tail, (about.st_mtime_ns, about.st_ctime_ns)
    key = f"{Path(path).resolve()}: {size} bytes, {times}"
    if key not in known:
        known[key] = file_hash(path, size)
        if size >= LARGE and memory is not None:
            write_json(memory, known)
    return known[key]


def hashes(*paths) -> dict[str, str]:
    """What something is made from, as it is recorded: path -> sha256."""
    return {str(Path(path)): known_hash(path) for path in paths}


def check_unchanged(made_from: dict[str, str], what, cure: str, today=()) -> None:
    """Raise ValueError naming the first file that is not what `what` was made from; or one of those
    that it would be made from `today` and that it was made without."""
    if not isinstance(made_from, dict) or not all(isinstance(x, str) for x in made_from.values()):
        raise ValueError(f"{what} is damaged: its record has no hashes; {cure}")
    for path, before in made_from.items():
        now = known_hash(path) if Path(path).is_file() else "no such file"
        if now != before:
            differs = f"{path} has changed (sha256 {before[:12]} then, {now[:12]} now)"
            raise ValueError(f"{what} was made from other content: {differs}; {cure}")
    if made_from and (more := sorted({*today} - made_from.keys())):
        raise ValueError(f"{what} was made without {more[0]}, which is there now; {cure}")


def git_state() -> dict:
    """The commit of this code, and whether tracked files differ from it; None without git."""
    ask = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.check_output([*ask, "--exclude=*"], stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
    commit, _, dirty = found.strip().partition("-")
    return {"git_commit": commit, "git_dirty": bool(dirty)}
