"""Ground floor: atomic writes, locks, hashes, JSON and the command line. Knows no tensors."""

from .atomic import atomic_path, copy_tokenizer, file_hash, read_json, tokenizer_hash, write_json
from .command import Finished, check_ranges, command_line, new_parser, printable
from .growing import GrowingFile
from .locks import Locked, check_apart, check_free, lock, unlock, unlock_all
from .origin import check_unchanged, git_state, hashes, known_hash
