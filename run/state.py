"""The state that an unfinished run goes on from: its newest two, each with its checksum.

    resume/state-000000400-9f86d081884c7d65.pt     step, and the first digits of the file's sha256

A state and its checksum appear in one rename, so no crash can leave one without the other. Two are
kept: the newest may be the one that the disk spoilt. Only tensors and plain values are read
(weights_only): a pickle that runs code is refused.
"""

from pathlib import Path

import torch

from .files import atomic_path, file_hash, read_json, sync_folder

STATES_KEPT = 2
HASH_DIGITS = 16


class OtherFlags(ValueError):
    """A run is resumed with flags that would change its result."""


def earlier_flags(out) -> dict:
    """The flags of the run in folder `out`, finished or not; empty where there is none."""
    for name, key in (("run.json", "args"), ("resume/flags.json", None)):
        if (Path(out) / name).is_file():
            content = read_json(Path(out) / name)
            return content.get(key, {}) if key else content
    return {}


def write_state(folder: Path, step: int, state: dict) -> None:
    """Add a state, drop all but the newest ones."""
    written = folder / "state.new"
    with atomic_path(written) as temporary:
        torch.save(state, temporary)
    digits = file_hash(written)[:HASH_DIGITS]
    written.replace(folder / f"state-{step:09d}-{digits}.pt")
    sync_folder(folder)
    for old in sorted(folder.glob("state-*.pt"))[:-STATES_KEPT]:
        old.unlink()


def newest_state(folder: Path) -> tuple[Path, dict, list[str]]:
    """The newest state whose bytes have the sha256 that its name tells, and its path.

    Third: what is wrong with newer ones. Raises ValueError where none is whole.
    """
    refused = []
    for path in sorted(folder.glob("state-*.pt"), reverse=True):
        try:
            if not file_hash(path).startswith(path.stem.split("-")[-1]):
                raise ValueError("its bytes are not those that were written")
            return path, read_state(path), refused
        except (ValueError, OSError) as error:
            refused.append(f"{path.name} is damaged ({error})")
    raise ValueError(
        f"{folder} cannot be read ({'; '.join(refused)}): start again with --overwrite"
    )


def read_state(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(str(error).splitlines()[0]) from None
