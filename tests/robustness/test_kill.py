"""Killed at any moment (SIGKILL: no handler, no last word) and started again, every command ends
with the same bytes as one that was not: weights, log, CSV rows, traces, caches.

One kill of a run and of a sweep here; with --slow some 60 of all kinds of command."""

import csv
import io
import json
import os
import random
import subprocess
import sys
import time
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import train_pretrain
from eval.experiments.jobs import Job, execute
from files import command_line, unlock_all

ROOT = Path(__file__).parents[2]
STEPS = ["--steps", "40", "--batch_size", "4", "--seq_len", "32", "--eval_every", "5"]
STEPS += ["--device", "cpu", "--dtype", "float32", "--no-compile", "--optimizer", "adamw"]
STEPS += ["--final_eval", "8"]
TIMES = ("seconds", "peak_memory_mb", "command", "device")  # that no two runs share
# Of training one command here; test_resume.py stops and resumes all of them, in one process, and
# test_crash_points.py ends traces and caches at every few of their file operations.
ONE_KILL = [(name, 1) for name in ("distill", "sweep")]
EIGHT_KILLS = [
    pytest.param(name, 8, marks=pytest.mark.slow)
    for name in ("pretrain", "distill", "reason", "cached", "traces", "cache", "sweep")
]
SWEEP = """
import dataclasses, sys
from functools import partial
from pathlib import Path
from eval.experiments import common, scales
if __name__ == "__main__":
    scale = dataclasses.replace(
        scales.SCALES["quick"], name="tiny", teacher="nano", student="nano", text_steps=20,
        text_batch=4, seq_len=32, teacher_steps=20, text_eval_every=10, text_final_eval=8,
        flags=(("dtype", "float32"), ("device", "cpu")),
    )
    arms = [
        ("teacher", partial(common.teacher_of, scale)), ("plain", partial(common.plain, scale)),
        ("distilled", partial(common.distilled, scale)),
    ]
    experiment = common.text_experiment(scale, "headline", arms, seeds=int(sys.argv[1]))
    common.run_experiments([experiment], Path("results"))
"""


def command_of(name: str, data: Path, teacher: Path, out: Path) -> list:
    """The command that makes `out`; after a kill the same one goes on (training: --resume)."""
    pair = ("--teacher", teacher, "--data", data)
    return {
        "pretrain": ["train_pretrain.py", "--model", "nano", "--data", data, *STEPS],
        "distill": ["train_distillation.py", *pair, *STEPS],
        "reason": [
            *("train_distill_reason.py", "--student", "nano", "--tokenizer", data),
            *("--data", data / "reason_train.jsonl", *STEPS, "--seq_len", "256"),
        ],
        "cached": [
            *("-m", "methods.cached_teacher", *pair, *STEPS),
            *("--teacher_cache", teacher and teacher.parent / "sample.cache"),
        ],
        "traces": [
            *("-m", "dataset.make_traces", "--teacher", teacher, "--keep", "all"),
            *("--temperature", "10"),  # or no reply of this teacher would end in time
            *("--prompts", data / "reason_prompts.jsonl", "--device", "cpu"),
        ],
        "cache": [
            *("-m", "dataset.teacher_cache", *pair, "--method", "sample", "--k", "8"),
            *("--seq_len", "8", "--device", "cpu", "--dtype", "float32"),
        ],
        "sweep": [str(out.parent / "sweep.py"), "1"],
    }[name] + ([] if name == "sweep" else ["--out", out])


def is_training(words) -> bool:
    """Whether a command goes on with --resume; the others do by themselves."""
    return "--steps" in words


def start(words, out: Path, log) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, words)]
    cwd = out.parent if words[1].endswith("sweep.py") else ROOT
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=log, stderr=log)


def prepare_sweep(folder: Path, data: Path) -> None:
    """The driver and its data."""
    (folder / "sweep.py").write_text(SWEEP)
    (folder / "out" / "tiny").mkdir(parents=True)
    (folder / "out" / "tiny" / "data").symlink_to(data)


def result_of(name: str, out: Path):
    """What must not depend on kills."""
    if name == "traces":
        return out.read_bytes(), json.loads(Path(f"{out}.progress.json").read_text())
    if name == "cache":
        return out.read_bytes()
    if name == "sweep":
        with open(out.parent / "results" / "headline" / "results.csv", newline="") as file:
            rows = [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]
        return sorted(rows, key=lambda row: (row["arm"], row["seed"]))
    with open(out / "log.csv", newline="") as file:
        log = [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]
    weights = (
        (out / "model.safetensors").read_bytes(),
        (out / "best/model.safetensors").read_bytes(),
    )
    return log, weights, json.loads((out / "run.json").read_text())["metrics"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("name, kills", [*ONE_KILL, *EIGHT_KILLS])
def test_killed_and_started_again(name, kills, prepared_folder, kill_teacher, tmp_path, request):
    rng = random.Random(f"{name} {kills} {time.time_ns()}")
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    if name == "sweep":  # what two at once have made
        folder, seconds, _ = request.getfixturevalue("two_sweeps")
        whole, seconds = folder / "out", seconds / 2  # alone it has the cores to itself
        killed.parent.mkdir()
        prepare_sweep(killed.parent, prepared_folder)
    else:
        seconds = finish(command_of(name, prepared_folder, kill_teacher, whole), whole)
    words = command_of(name, prepared_folder, kill_teacher, killed)
    words += ["--resume"] if is_training(words) else []
    # Not while Python starts: nothing of ours runs yet. The end may be passed.
    moments = [rng.uniform(0.4, 1.1) * seconds for _ in range(kills)]
    killed.parent.mkdir(exist_ok=True)
    with open(killed.parent / "log", "w") as log:
        for moment in moments:
            process = start(words, killed, log)
            time.sleep(moment)
            process.kill()
            process.wait()
    why = f"killed after {moments} s of {seconds}"
    finish(words, killed, why)
    assert result_of(name, killed) == result_of(name, whole), why


def finish(words: list, out: Path, why: str = "") -> float:
    """The seconds that a command takes, which must end well."""
    out.parent.mkdir(exist_ok=True)
    begun = time.perf_counter()
    with open(out.parent / "log", "a+") as log:
        code = start(words, out, log).wait(timeout=300)
        log.seek(0)
        assert code == 0, f"{why}\n{log.read()[-3000:]}"
    return time.perf_counter() - begun


@pytest.fixture(scope="module")
def two_sweeps(prepared_folder, tmp_path_factory):
    """The folder that two sweeps have filled which were started at once, how long they took, and
    what they said."""
    folder, begun = tmp_path_factory.mktemp("two_sweeps"), time.perf_counter()
    prepare_sweep(folder, prepared_folder)
    with open(folder / "log", "w+") as log:
        words = [str(folder / "sweep.py"), "1"]
        both = [start(words, folder / "out", log) for _ in range(2)]
        codes = [process.wait(timeout=300) for process in both]
        log.seek(0)
        said = log.read()
    assert codes == [0, 0], said[-3000:]
    return folder, time.perf_counter() - begun, said


def test_two_sweeps_share_the_work(two_sweeps):
    """Started at once in one folder: every row once, every run made once."""
    folder, _, said = two_sweeps
    rows = [(row["arm"], row["seed"]) for row in result_of("sweep", folder / "out")]
    assert sorted(rows) == sorted({(a, s) for a in ("teacher", "plain", "distilled") for s in "0"})
    assert said.count("perplexity") == len(rows), said[-3000:]


def test_no_other_sweep_comes_between(prepared_folder, tmp_path, monkeypatch):
    """From the look at a run's folder on nobody else may make that run."""
    flags = (("model", "nano"), ("data", prepared_folder), ("steps", 2), ("batch_size", 2))
    flags += (("seq_len", 32), ("device", "cpu"), ("dtype", "float32"), ("compile", False))
    job, codes = Job("train_pretrain", str(tmp_path / "run"), flags), []

    def main(args):
        with open(tmp_path / "log", "w") as log:
            other = start(["train_pretrain.py", *job.argv], tmp_path / "run", log)
            codes.append(other.wait(timeout=300))
        train_pretrain.main(args)

    script = types.SimpleNamespace(main=main, parse_args=train_pretrain.parse_args)
    monkeypatch.setitem(sys.modules, "train_pretrain", script)
    execute(job)
    assert codes == [2] and "in use by another process" in (tmp_path / "log").read_text()
    assert job.is_done()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size there")
@pytest.mark.parametrize("limit", [500, 20_000, 300_000, 600_000])
def test_a_full_disk_loses_nothing(limit, prepared_folder, never_full, tmp_path):
    """A limit on the size of a file stands for the disk: config, tokenizer, weights and resume
    state fail in turn. Afterwards the run goes on and ends as if nothing had happened."""
    words = command_of("pretrain", prepared_folder, None, tmp_path / "run")
    import resource

    said, (now, most) = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # Into memory: pytest keeps what is printed in a file, which has the same limit.
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as end:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            command_line(train, words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (now, most))
            unlock_all()
    assert end.value.code == 2
    assert "could not be written" in said.getvalue() and "make room on its disk" in said.getvalue()
    assert not list(tmp_path.glob("run/**/*.tmp"))
    train(words, "--resume")  # in this process
    assert result_of("pretrain", tmp_path / "run") == never_full


def train(words, *more) -> None:
    assert words[0] == "train_pretrain.py"
    words = [str(word) for word in (*words[1:], *more)]
    train_pretrain.main(train_pretrain.parse_args(words))


@pytest.fixture(scope="module")
def never_full(prepared_folder, tmp_path_factory):
    """What a run comes to whose disk is large enough."""
    out = tmp_path_factory.mktemp("never_full") / "run"
    train(command_of("pretrain", prepared_folder, None, out))
    return result_of("pretrain", out)
