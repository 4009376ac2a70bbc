"""How far a long job is: a moving bar in a terminal, plain lines in a log file or a pipe."""

import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

SHORTEST, LONGEST = 10, 60  # seconds between two lines
position = None  # the line of this process's bar, where several processes show one


def progress_bar(total: float | None, desc: str, initial=0, unit="step", silent=False):
    """A context with `update(n)`, `set_postfix_str(text)`, `write(text)`, and the attribute
    `total`, None where unknown. What has ended leaves no bar: its caller says so in one line."""
    if silent or sys.stderr.isatty():
        shown = {"unit": unit, "position": position, "leave": False, "mininterval": 0.5}
        return tqdm(total=total, desc=desc, initial=initial, disable=silent, **shown)
    return Lines(total, desc, initial, unit)


class Lines(AbstractContextManager):
    """Stands for the bar: a line each minute, or as soon as another tenth is done, but then at
    least 10 seconds after the last one. A job of a few seconds writes none."""

    def __init__(self, total: float | None, desc: str, initial: float, unit: str):
        self.total, self.desc, self.n, self.unit = total, desc, initial, unit
        self.postfix, self.last_n, self.last_time = "", initial, time.monotonic()

    def update(self, n: float = 1) -> None:
        self.n += n
        waited = time.monotonic() - self.last_time
        tenth = self.total is not None and 10 * (self.n - self.last_n) >= self.total
        is_over = self.total is not None and self.n >= self.total
        if not is_over and (waited >= LONGEST or (tenth and waited >= SHORTEST)):
            of_total = f" of {self.total:,.0f}" if self.total is not None else ""
            line = f"{self.desc}: {self.unit} {self.n:,.0f}{of_total}{self.postfix}"
            print(line, file=sys.stderr, flush=True)
            self.last_n, self.last_time = self.n, time.monotonic()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = f", {text}"

    def write(self, text: str) -> None:
        print(text, flush=True)

    def __exit__(self, *_) -> None:
        pass
