"""Ground floor: atomic writes, locks, hashes, JSON and the command line. Knows no tensors."""

from .atomic import (
    atomic_path,
    check_file,
    check_keys,
    copy_tokenizer,
    parse_json,
    read_json,
    tokenizer_paths,
    write_json,
)
from .command import Finished, as_value_error, check_ranges, command_line, new_parser, printable
from .growing import GrowingFile
from .locks import Locked, check_apart, check_free, lock, unlock, unlock_all
from .origin import check_unchanged, file_hash, git_state, hashes, known_hash, tokenizer_hash
