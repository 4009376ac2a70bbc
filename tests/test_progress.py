"""Progress is a moving bar in a terminal, and plain lines now and then everywhere else."""

import io
import sys
import types

import pytest

from dataset import make_traces
from files import progress
from tests.short_runs import argv_of, make_teacher, run


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def stderr(monkeypatch):
    """stderr(is_terminal) puts a stream in its place. (Called in the test: pytest has its own until
    then.)"""

    def replace(is_terminal: bool) -> Stream:
        monkeypatch.setattr(sys, "stderr", Stream(is_terminal))
        return sys.stderr

    return replace


def update_each(monkeypatch, seconds: float, updates: int, *args, **options) -> None:
    """A bar that is updated so many times, once every so many seconds of a made-up clock."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    with progress.progress_bar(*args, **options) as bar:
        bar.set_postfix_str("loss 4.250", refresh=False)
        for _ in range(updates):
            clock.now += seconds
            bar.update()


def test_a_terminal_shows_a_bar_that_is_gone_at_the_end(stderr):
    stream = stderr(is_terminal=True)
    with progress.progress_bar(10, "teacher") as bar:
        bar.update(4)
        bar.refresh()
    text = stream.getvalue()
    assert "teacher:  40%" in text and "4/10" in text
    assert text.count("\n") == 0 and text.endswith("\r")


@pytest.mark.parametrize(
    "total, seconds, updates, expected",
    [
        (1000, 0.5, 1000, [f"step {n} of 1,000" for n in range(100, 1000, 100)]),  # tenths
        (1000, 1 / 16, 1000, [f"step {n} of 1,000" for n in range(160, 1000, 160)]),  # 10 s
        (1000, 1.0, 150, ["step 60 of 1,000", "step 120 of 1,000"]),  # each minute
        (None, 1.0, 150, ["step 60", "step 120"]),
        (100, 0.09, 100, []),  # 9 seconds
        (1, 100.0, 1, []),  # the end is its caller's to report
    ],
)
def test_elsewhere_lines_come_now_and_then(stderr, monkeypatch, total, seconds, updates, expected):
    stream = stderr(is_terminal=False)
    update_each(monkeypatch, seconds, updates, total, "teacher")
    assert stream.getvalue().splitlines() == [f"teacher: {x}, loss 4.250" for x in expected]


def test_a_resumed_run_counts_from_where_it_began(stderr, monkeypatch):
    stream = stderr(is_terminal=False)
    update_each(monkeypatch, 60, 1, 10**6, "traces", initial=2000, unit="problem")
    assert stream.getvalue() == "traces: problem 2,001 of 1,000,000, loss 4.250\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_said_beside_it_goes_to_stdout(stderr, is_terminal, capsys):
    stderr(is_terminal)
    with progress.progress_bar(10, "runs") as bar:
        bar.write("$ python train_pretrain.py")
    assert capsys.readouterr().out == "$ python train_pretrain.py\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_silent_process_shows_nothing(stderr, is_terminal):
    stream = stderr(is_terminal)
    with progress.progress_bar(10, "rank 1", silent=True) as bar:
        bar.set_postfix_str("loss 1")
        bar.update(5)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("name", ["pretrain", "traces"])
def test_a_run_ends_in_one_line(
    stderr, name, is_terminal, prepared_folder, tmp_path, monkeypatch, capsys
):  # fmt: skip
    """In a log: lines without cursor codes, here one a step; its own last line is the only one on
    stdout."""
    stream = stderr(is_terminal)
    monkeypatch.setattr(progress, "SHORTEST", 0)
    teacher = make_teacher(tmp_path, prepared_folder)
    assert capsys.readouterr().out.count("\n") == 1
    if name == "pretrain":
        script, *words = argv_of(name, prepared_folder, teacher)
        run(script, *words, "--out", tmp_path / "run")
    else:
        prompts = prepared_folder / "reason_prompts.jsonl"
        words = ["--teacher", teacher, "--prompts", prompts, "--keep", "all", "--temperature", 1]
        run(make_traces, *words, "--out", tmp_path / "traces.jsonl")
    out, text = capsys.readouterr().out, stream.getvalue()
    assert out.count("\n") == 1 and out.startswith(str(tmp_path))
    assert ("\r" in text) == is_terminal
    if not is_terminal:
        assert "\x1b" not in text
        assert "teacher: step 2 of 12" in text
