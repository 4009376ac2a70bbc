"""The rows of an experiment's CSV: read, added to, and refused where what they were made from has
changed since."""

import csv
import shlex
from pathlib import Path

from files import known_hash, lock, read_json, unlock
from model import weights_hash

COLUMNS = (
    "experiment arm seed student_params teacher_params tokens temperature alpha val_loss "
    "perplexity bits_per_byte agreement kl ece seconds peak_memory_mb flops"
).split()


def short_hashes(sources: dict) -> dict[str, str]:
    """The first digits of what a run was made from; of several teachers, one after another."""
    columns = {}
    for name in ("data_sha256", "tokenizer_sha256", "teacher_sha256"):
        hashes = sources.get(name, [])
        hashes = [hashes] if isinstance(hashes, str) else hashes
        columns[name] = " ".join(value[:12] for value in hashes)
    return columns


def read_rows(path: Path) -> list[dict]:
    """All rows of a CSV, as text; none where there is no file yet. Raises ValueError for a file
    that is no CSV, or has a row of another length than its first line."""
    if not Path(path).is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV ({error}): make it again") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} has more or fewer columns than the first line")
    return rows


def inputs_of(row: dict) -> list[tuple[str, str]]:
    """What a row was made from: "--data out/data" and the first digits of its hash, ..."""
    words, found = shlex.split(row.get("command", "")), []
    if row.get("problems_sha256"):
        found.append(("test problems", row["problems_sha256"]))
    for flag, column in (("--data", "data_sha256"), ("--teacher", "teacher_sha256")):
        if flag in words and row.get(column):  # earlier versions wrote no hashes
            paths = words[words.index(flag) + 1].split(",")  # several teachers
            # A chain has more hashes than it was given folders: of its own phases, which come last.
            pairs = zip(paths, row[column].split(), strict=False)
            found += [(f"{flag} {path}", digest) for path, digest in pairs]
    return found


def check_still_there(path: Path, rows: list[dict]) -> None:
    """Raise ValueError where data or teachers that rows were made from have changed since. Those
    that are gone are not asked for: the table may be all that was kept."""
    for name, digest in dict(found for row in rows for found in inputs_of(row)).items():
        flag, _, place = name.partition(" ")
        if flag == "--data" and Path(place).is_file():
            now = known_hash(place)
        elif flag == "--data" and (meta := Path(place, "meta.json")).is_file():
            now = read_json(meta, train=dict)["train"].get("sha256", "")
        elif flag == "--teacher" and Path(place, "config.json").is_file():
            now = weights_hash(place)
        else:
            continue
        if not now.startswith(digest):
            other = f"{path} has rows made with {name} of sha256 {digest}, now it has {now[:12]}"
            raise ValueError(f"{other}: move that file, or pass another --results")


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows; the first one settles the columns. Those whose arm and seed are there already are
    left out: another sweep, sharing the work, has written them. Raises ValueError where the rows
    that are there were made from other data or another teacher of the same name."""
    lock(path, wait=True)
    try:
        known = read_rows(path)
        before = {key: digest for row in known for key, digest in inputs_of(row)}
        for name, digest in (found for row in rows for found in inputs_of(row)):
            if (made := before.get(name, digest)) != digest:
                other = f"{path} has rows made with {name} of sha256 {made}, now it has {digest}"
                raise ValueError(f"{other}: move that file, or pass another --results")
        present = {(row["arm"], row["seed"]) for row in known}
        rows = [row for row in rows if (row["arm"], str(row["seed"])) not in present]
        columns = list(known[0]) if known else [*dict.fromkeys([*COLUMNS, *rows[0]])]
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            if not known:
                writer.writeheader()
            for row in rows:
                short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(short)
    finally:
        unlock(path)
