"""The command line of every script: one way to parse flags, and one way to report a mistake.

What a user got wrong is a ValueError or OSError; it ends in one sentence and exit code 2.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# What torch says where memory is full, on a CPU and on a GPU.
NO_MEMORY = ("can't allocate memory", "out of memory")
NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # NUL, and how Python reads bytes that are no UTF-8
NO_PATHS = ("system", "api")  # flags whose values are words or an address
CACHED = "python -m methods.cached_teacher --teacher_cache FILE"


class Finished(Exception):
    """Raised where a resumed command finds nothing left to do."""


@contextmanager
def as_value_error(what: str, cure: str) -> Iterator[None]:
    """What the library raises, as ValueError: a bare Exception, and of a panic not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(f"{what} ({reason}): {cure}") from None


class Parser(argparse.ArgumentParser):
    """argparse, and a word on where a flag has moved."""

    def parse_args(self, args=None, namespace=None):
        """Refuses an empty word, which would stand for the folder that the command runs in. Paths
        are made alike, for they are compared: "rd/" is "rd"."""
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        for before, word in zip(["", *words], words, strict=False):
            if not word or NO_TEXT.search(word) or (word[:2] == "--" and word[-1] == "="):
                flag = word.split("=")[0] if word.startswith("--") else before
                self.exit(2, f"error: {flag} is empty or no text: give it a value in UTF-8\n")
        parsed = super().parse_args(words, namespace)
        named = {k: v for k, v in vars(parsed).items() if k not in NO_PATHS}
        paths = {k: v for k, v in named.items() if isinstance(v, str) and "/" in v}
        vars(parsed).update({name: str(Path(path)) for name, path in paths.items()})
        return parsed

    def error(self, message: str):
        if message.startswith("unrecognized") and "--teacher_cache" in message:
            message = f"--teacher_cache has moved: {CACHED}"
        super().error(message)


RANGES = {  # flag: (smallest, largest)
    "seed": (0, 2**31), "steps": (1, 10**9), "flops": (1, 1e30), "seconds": (1e-3, 1e9),
    "batch_size": (1, 2**20), "seq_len": (2, 2**20), "accumulation_steps": (1, 2**20),
    "learning_rate": (1e-12, 100.0), "warmup": (0, 10**9), "weight_decay": (0.0, 100.0),
    "grad_clip": (0.0, 1e9), "eval_every": (1, 10**9), "final_eval": (1, 10**9),
    "patience": (0, 10**9), "alpha": (0.0, 1.0), "temperature": (1e-3, 1e3),
    "data_share": (1e-6, 1.0), "tag_weight": (0.0, 1e6), "think_weight": (0.0, 1e6),
    "answer_weight": (0.0, 1e6), "k": (1, 2**20), "val_share": (0.01, 0.5),
    "problems": (1, 10**9), "prompts": (1, 10**9), "test_problems": (1, 10**9),
    "vocab_size": (263, 2**24), "samples": (1, 10**6), "top_k": (0, 2**24), "top_p": (1e-6, 1.0),
    "max_new_tokens": (1, 10**6), "rounds": (1, 10**6),
}  # fmt: skip


def of_range(low: float, high: float, word: str = "to") -> str:
    """ "1 to 1,000", "0.001 to 1e+09"."""
    shown = (f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in (low, high))
    return f" {word} ".join(shown)


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows a file's docstring as it stands, and after each flag its range and its default."""

    def __init__(self, ranges: dict[str, tuple], **options):
        super().__init__(**options)
        self.ranges = ranges

    def _get_help_string(self, action: argparse.Action) -> str:  # argparse's own hook for this
        more = []
        if action.type in (int, float) and action.dest in self.ranges:
            more = [of_range(*self.ranges[action.dest])]
        if action.default not in (None, argparse.SUPPRESS):
            default = ("off", "on")[action.default] if action.nargs == 0 else "%(default)s"
            more.append(f"default {default}")
        return action.help + f" [{', '.join(more)}]" * bool(more)


def new_parser(description: str, **ranges: tuple) -> argparse.ArgumentParser:
    """A parser whose --help has all ranges and defaults; `ranges` replace those of RANGES here."""
    return Parser(description=description, formatter_class=partial(Help, RANGES | ranges))


def check_ranges(args, **ranges: tuple) -> None:
    """Raise ValueError, naming the flag and its range, for a value outside it."""
    for name, (low, high) in (RANGES | ranges).items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not low <= value <= high:  # also refuses NaN
            raise ValueError(f"--{name} {value} must be between {of_range(low, high, 'and')}")


def printable(text: str) -> str:
    """Without control characters, which could otherwise command the terminal."""
    spaces = "\n\u3000\xa0"  # of Chinese text, and one that does not break
    return "".join(c if c in spaces or c.isprintable() else "\ufffd" for c in text)


def end_alone(code: int, message: str | None) -> None:
    """Report, and end this process unless all is well."""
    if message is not None:
        print(printable(message), file=sys.stderr)  # it may quote a stranger's file
    if code:
        sys.exit(code)


end_process = end_alone  # run/parallel.py puts its own here where there are several processes


def command_line(main, args=None) -> None:
    """Run `main(args)`; a user's mistake ends in one sentence on stderr and exit code 2."""
    code, message = 0, None
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of the text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except Finished as reason:
        print(reason)
    except (ValueError, OSError) as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt as stop:
        code, message = 130, str(stop) or "stopped"
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            reason = (str(error) or "MemoryError").splitlines()[0][:200]
            cure = "lower --batch_size or --seq_len, raise --accumulation_steps, or take a smaller"
            code, message = 2, f"error: out of memory ({reason}): {cure} model"
        elif end_process is end_alone:
            raise
        else:
            code, message = 1, traceback.format_exc()
    end_process(code, message)
