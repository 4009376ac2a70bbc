"""What every run does alike: device, seed, schedule, optimizer, checkpoint and resume, log."""

from .batches import Ahead, microbatches, places_in_use
from .files import command_line
from .flags import add_common_flags, new_parser
from .folder import Run
from .optim import Optimizer
from .setup import autocast, setup
from .shards import place
from .speed import settle_speed

__all__ = [
    "Ahead",
    "Optimizer",
    "Run",
    "add_common_flags",
    "autocast",
    "command_line",
    "microbatches",
    "new_parser",
    "place",
    "places_in_use",
    "settle_speed",
    "setup",
]
