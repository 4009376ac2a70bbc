"""Ground floor: atomic writes, locks, hashes, JSON and the command line. Knows no tensors."""

from .atomic import (
    atomic_path,
    copy_tokenizer,
    file_hash,
    read_json,
    sync_folder,
    tokenizer_hash,
    write_json,
)  # fmt: skip
from .command import Finished, check_ranges, command_line, new_parser, printable
from .locks import Locked, lock, unlock, unlock_all
from .origin import git_state
