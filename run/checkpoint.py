"""The folder of a run, and the states that an unfinished run goes on from.

    config.json, model.safetensors, tokenizer.json ...   the last weights: a Hugging Face folder
    best/                                                 the same, of the lowest held-out loss
    log.csv                                               one row per logged step
    run.json                                              what ran, where, and what came out
    resume/state-000000400-9f86d081884c7d65.pt            only while the run is unfinished

run.json or resume/ is there from the first moment on: a folder without is not a run's.

A state holds everything that the next step depends on. Its name has the first digits of its
sha256: both appear in one rename, so no crash can leave one without the other. Two are kept: the
newest may be the one that the disk spoilt. Only tensors and plain values are read (weights_only).
"""

import json
import shutil
from pathlib import Path

import torch

import files
from files.atomic import move, terms_in

from . import parallel

STATES_KEPT, HASH_DIGITS = 2, 16
NOT_IN_RESULT = ("out", "resume", "overwrite", "fsdp")  # flags that do not change what is computed


class RunFolder:
    """args.out: refuses to lose a run that is already there, or goes on with it."""

    def __init__(self, args):
        self.path, self.args = Path(args.out), args
        self.made_from: dict[str, str] = {}  # hashes of all files that the run reads

    @property
    def flags(self) -> dict:  # of now, for some are settled on the way; plain values
        return json.loads(json.dumps(vars(self.args), default=str))

    def open(self, resume: bool, overwrite: bool) -> tuple[dict | None, str]:
        """Lock the folder; returns the state to go on from, or None, and where it was found. Raises
        Finished where nothing is left to resume, ValueError where something would be lost, or where
        flags or files are not those it began with."""
        if parallel.is_main():
            files.lock(self.path)
        record, states = self.path / "run.json", list(self.path.glob("resume/state-*.pt"))
        state, source = None, ""
        for name in (path.name for path in self.path.glob("resume/*")):
            if not name.startswith("state"):
                theirs = f"{self.path}/resume holds files that no run made ({name})"
                raise ValueError(f"{theirs}: pass another --out")
        is_ours = files.check_free(self.path, ("run.json", "resume"), overwrite)
        if resume and record.is_file():
            before = files.read_json(record, args=dict)
            self.check_same(before["args"], before.get("made_from", {}))
            raise files.Finished(f"{self.path}: finished already, nothing to resume")
        if resume and states:
            file, state, refused = newest_state(self.path / "resume")
            self.check_same(state["flags"], state.get("made_from", {}))
            source = "; ".join([file.name, *refused])
        elif resume:
            print(f"{self.path}: no state to resume, starting at step 0")
        elif (record.is_file() or states) and not overwrite:
            go_on = "" if record.is_file() else "--resume to go on with it, "
            cure = f"pass {go_on}--overwrite to replace it, or another --out"
            raise ValueError(f"{self.path} already holds a run: {cure}")
        parallel.barrier()  # nothing is written before all processes have read
        if parallel.is_main():
            (self.path / "resume").mkdir(parents=True, exist_ok=True)
            if overwrite:
                if record.is_file():
                    nested = [*self.path.glob("best/**/"), *self.path.glob("student*/")]
                    for terms in (t for folder in (self.path, *nested) for t in terms_in(folder)):
                        terms.unlink()  # of the weights that go
                record.unlink(missing_ok=True)
                for old in states:
                    old.unlink()
            for place in ("", "resume/", "best/**/", "student*/") if is_ours else ():
                for left in self.path.glob(f"{place}*.[0-9]*.tmp"):  # of a process that was killed
                    left.unlink()
        return state, source

    def check_same(self, flags: dict, made_from: dict) -> None:
        for name, value in self.flags.items():
            if name not in NOT_IN_RESULT and flags.get(name) != value:
                ran = flags.get(name)
                ran = "without it" if ran is None or ran is False else f"with {ran}; use that"
                ran = f"it ran {ran}, or pass another --out"
                raise ValueError(f"cannot resume {self.path} with --{name} {value}: {ran}")
        cure = "put that back, pass --overwrite to start again, or another --out"
        files.check_unchanged(made_from, self.path, cure, self.made_from)

    def save_state(self, step: int, state: dict) -> None:
        """Add a state, drop all but the newest ones. To be called by rank 0."""
        new = self.path / "resume" / "state.new"
        with files.atomic_path(new) as temporary:
            torch.save({**state, "flags": self.flags, "made_from": self.made_from}, temporary)
        move(new, new.with_name(f"state-{step:09d}-{files.file_hash(new)[:HASH_DIGITS]}.pt"))
        for old in sorted(new.parent.glob("state-*.pt"))[:-STATES_KEPT]:
            old.unlink()

    def finish(self, record: dict) -> None:
        files.write_json(self.path / "run.json", record)
        shutil.rmtree(self.path / "resume", ignore_errors=True)


def newest_state(folder: Path) -> tuple[Path, dict, list[str]]:
    """The newest state whose bytes have the sha256 that its name tells: its path, the state, and
    what is wrong with newer ones. Raises ValueError where none is whole."""
    refused = []
    for path in sorted(folder.glob("state-*.pt"), reverse=True):
        try:
            if not files.file_hash(path).startswith(path.stem.split("-")[-1]):
                raise ValueError("its bytes are not those that were written")
            state = torch.load(path, map_location="cpu", weights_only=True)
            return path, files.check_keys(state, path, flags=dict), refused
        except Exception as error:  # torch raises many types for a damaged file
            refused.append(f"{path.name} is damaged ({str(error).splitlines()[0]})")
    raise ValueError(f"no state can be read ({'; '.join(refused)}): start again with --overwrite")
