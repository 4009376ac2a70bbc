"""What every training run does alike, behind seven words: see run/run.py."""

from files import command_line, new_parser

from .evaluation import evaluate, loss_together
from .flags import add_common_flags, add_teacher_dtype
from .phases import run_phase, val_loss
from .run import Run
