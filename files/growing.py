"""A file that grows for hours: a call that was stopped resumes after the last whole part."""

import os
from pathlib import Path

from .atomic import read_json, write_json
from .origin import check_unchanged


class GrowingFile:
    """`file`, open to append to, and NAME.progress.json beside it: of which `options` the file is
    made (options["made_from"]: of which files), how many of its bytes are whole, and the caller's
    counts. Raises ValueError where another file stands in the way, unless it is to `overwrite`."""

    def __init__(self, path: Path, options: dict, overwrite: bool = False, **counts: int):
        self.record_path = path.with_name(f"{path.name}.progress.json")
        self.record = new = {"options": options, **counts, "bytes": 0}
        if overwrite:
            path.unlink(missing_ok=True)
            self.record_path.unlink(missing_ok=True)
        cure = "pass another --out, or --overwrite to replace it"
        if path.exists() and not self.record_path.is_file():
            raise ValueError(f"{path} exists and is not a file to go on with: {cure}")
        if path.exists():
            self.record = read_json(self.record_path, **{k: type(v) for k, v in new.items()})
            before = self.record["options"]
            check_unchanged(before.get("made_from", {}), path, cure, options.get("made_from", {}))
            if self.record.keys() != new.keys() or before != options:
                other = {k: v for k, v in before.items() if options.get(k) != v}
                raise ValueError(f"{path} was begun with other flags ({other}): use those, {cure}")
        if path.exists() and (size := path.stat().st_size) < self.record["bytes"]:
            short = f"{path} has {size:,} bytes, its record says {self.record['bytes']:,}"
            raise ValueError(f"{short}: delete it, and the same command makes it again")
        write_json(self.record_path, self.record)  # before the file: one without it is not ours
        self.file = open(path, "ab")
        self.file.truncate(self.record["bytes"])  # what a killed call wrote after its last record

    def commit(self, **counts: int) -> None:
        """Make what was written until now last, and then the record that says so."""
        self.file.flush()
        os.fsync(self.file.fileno())  # the record must not outlive the bytes in a power cut
        self.record |= {**counts, "bytes": self.file.tell()}
        write_json(self.record_path, self.record)
