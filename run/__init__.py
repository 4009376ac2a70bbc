"""What every run does alike: device, seed, schedule, optimizer, checkpoint and resume, log."""

from .batches import microbatches
from .files import command_line
from .flags import add_common_flags, new_parser
from .folder import Run
from .optim import Optimizer
from .setup import autocast, setup
from .shards import place

__all__ = [
    "Optimizer",
    "Run",
    "add_common_flags",
    "autocast",
    "command_line",
    "microbatches",
    "new_parser",
    "place",
    "setup",
]
