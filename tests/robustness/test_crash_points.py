"""A crash just before every single file operation of a command: the same command then goes on, and
ends with the same bytes. (test_kill.py kills at random moments; this leaves no moment out.) CI
takes every 13th operation, from a random one on, of commands that share their code with another
fewer, or none; --slow takes all.

The driver below runs in a process of its own: it imports everything once, then forks a child for
each crash. In the child an audit hook counts the operations that change files under the output's
folder, and ends the process, with no handler and nothing flushed, before the n-th.
"""

import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.robustness.test_kill import ROOT, command_of, is_training, result_of

STEPS = ["--steps", "6", "--eval_every", "2", "--batch_size", "2"]
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
STRIDES = {"pretrain": 13, "distill": 41, "traces": 11, "cache": 5}
ALL = (*STRIDES, "reason", "cached")


def crash_before(number: int, root: str) -> None:
    """End this process before its `number`-th change of a file under `root`."""
    left = [number]

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            change = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, change = (args[0], event in CHANGES) if event in CHANGES else (None, False)
        if change and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
            left[0] -= 1
            if left[0] == 0:
                os._exit(77)

    sys.addaudithook(hook)


def in_child(words: list, log: str, crash=None) -> int:
    """The exit code of a command of ours that runs in a fork; it writes to the file `log`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    import runpy

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    if crash:
        crash_before(*crash)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    os._exit(code)


def drive(words: list, folder: Path, first: int, stride: int) -> None:
    """Crash before operations first, first + stride ... until the command ends by itself.

    Each is in a folder named by its number, whose last the run without a crash has.
    """
    import torch
    import torch._dynamo  # torch's optimizers import it, for a second

    import methods.cached_teacher  # noqa: F401
    import train_distill_reason  # noqa: F401, imported once for all children
    import train_distillation  # noqa: F401
    import train_pretrain  # noqa: F401
    from run import training

    training.EVALUATED = 8  # half of a short run's time went into that
    torch.set_num_threads(1)
    again = ["--resume"] if is_training(words) else []
    for number in itertools.count(first, stride):
        place = folder / str(number)
        place.mkdir()
        log, line = str(place / "log"), [*words, "--out", str(place / "run" / "out")]
        code = in_child(line, log, (number, str(place / "run")))
        if code == 0:
            break
        assert code == 77, Path(log).read_text()
        code = in_child([*line, *again], log)
        assert code == 0, f"crash {number}: exit {code}\n{Path(log).read_text()[-3000:]}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
@pytest.mark.parametrize(
    "name, stride",
    [*STRIDES.items(), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ALL)],
)
def test_a_crash_before_any_file_operation(name, stride, prepared_folder, kill_teacher, tmp_path):
    words = [str(word) for word in command_of(name, prepared_folder, kill_teacher, Path("X"))[:-2]]
    words += STEPS if is_training(words) else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = random.Random(time.time_ns()).randint(1, stride)
    driver = subprocess.run(
        [sys.executable, __file__, tmp_path, str(first), str(stride), *words],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert driver.returncode == 0, driver.stderr[-4000:]
    numbers = sorted(int(folder.name) for folder in tmp_path.iterdir())
    assert len(numbers) > 1
    *crashed, whole = (result_of(name, tmp_path / str(n) / "run" / "out") for n in numbers)
    for number, result in zip(numbers, crashed, strict=False):
        assert result == whole, f"crash before operation {number}"


if __name__ == "__main__":
    drive(sys.argv[4:], Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
