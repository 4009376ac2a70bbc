"""Stopped anywhere and started again with --resume, a run ends with the same bits as one that was
not stopped. (Here in one process; test_kill.py kills processes.)"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_pretrain
from dataset import make_traces
from files import Finished, growing, read_json
from run.optimizer import Optimizer
from tests.short_runs import (
    ALL,
    SMALL,
    Killed,
    argv_of,
    kill_in_update,
    logged,
    make_teacher,
    run,
    same_bits,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("runs"), prepared_folder)


@pytest.mark.parametrize("name", ALL)
def test_a_killed_run_resumes_to_the_same_bits(
    name, prepared_folder, teacher, tmp_path, monkeypatch
):
    script, *flags = argv_of(name, prepared_folder, teacher)
    flags += ["--steps", 8]
    record = run(script, *flags, "--out", tmp_path / "whole")
    assert record["metrics"]["val_loss"] < 6.5
    assert not (tmp_path / "whole" / "resume").exists()
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_in_update(killing, 7)  # the last saved state is of step 4
        run(script, *flags, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "run.json").exists()
    resumed = run(script, *flags, "--out", tmp_path / "killed", "--resume")
    assert same_bits(tmp_path / "whole", tmp_path / "killed")
    assert same_bits(tmp_path / "whole" / "best", tmp_path / "killed" / "best")
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    assert record["metrics"] == resumed["metrics"]


def test_a_budget_of_flops_is_resumed(prepared_folder, tmp_path, monkeypatch):
    """The rate of every step follows what is spent, so that is part of the state."""
    flags = ["--model", "nano", "--data", prepared_folder, *SMALL[2:]]
    script, flops = argv_of("pretrain", prepared_folder, None)[0], 3e9
    record = run(script, *flags, "--flops", flops, "--out", tmp_path / "whole")
    assert record["flops"] >= flops and record["steps"] > 8
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_in_update(killing, 7)
        run(script, *flags, "--flops", flops, "--out", tmp_path / "killed")
    run(script, *flags, "--flops", flops, "--out", tmp_path / "killed", "--resume")
    assert same_bits(tmp_path / "whole", tmp_path / "killed")
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


def clock(monkeypatch, seconds: float) -> None:
    """A clock by which every step takes that long."""
    now, update = [0.0], Optimizer.update

    def update_slowly(self, rate):
        update(self, rate)
        now[0] += seconds

    monkeypatch.setattr(Optimizer, "update", update_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def test_a_budget_of_seconds_keeps_its_number_of_steps(
    prepared_folder, tmp_path, monkeypatch, capsys
):
    """After 21 steps of 1/8 s there is time for 11 more in 4 s: printed, and kept by a run that
    goes on where steps take longer."""
    flags = ["--model", "nano", "--data", prepared_folder, *SMALL[2:], "--seconds", "4"]
    script = argv_of("pretrain", prepared_folder, None)[0]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        clock(patch, 1 / 8)
        kill_in_update(patch, 27)  # the last saved state is of step 24, 3 seconds
        run(script, *flags, "--out", tmp_path / "run")
    assert "--seconds 4: 32 steps" in capsys.readouterr().out
    clock(monkeypatch, 1.0)
    record = run(script, *flags, "--out", tmp_path / "run", "--resume")
    assert record["steps"] == 32 and record["seconds"] == 3 + 8 * 1.0
    assert "--seconds 4" not in capsys.readouterr().out


def test_a_slash_makes_no_other_folder_of_the_data(prepared_folder, tmp_path):
    """What is compared on --resume is the folder, not how it was typed."""
    words = ["--model", "nano", "--out", tmp_path / "run", *SMALL, "--steps", 2]
    run(train_pretrain, "--data", prepared_folder, *words)
    again = ["--data", f"{prepared_folder}/", *words, "--out", f"{tmp_path}/run/", "--resume"]
    with pytest.raises(Finished, match="finished already"):
        run(train_pretrain, *again)


# Traces.


def test_traces_resume_and_keep(prepared_folder, teacher, tmp_path, monkeypatch):
    flags = ["--teacher", teacher, "--prompts", prepared_folder / "reason_prompts.jsonl"]
    flags += ["--keep", "all", "--temperature", "1", "--samples", "2", "--device", "cpu"]
    monkeypatch.setattr(make_traces, "CHUNK", 7)
    run(make_traces, *flags, "--out", tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text("utf-8").splitlines()
    record = read_json(tmp_path / "whole.jsonl.finished.json")
    assert len(lines) == record["kept"] <= record["written"] == 2 * record["problems"]
    assert json.loads(lines[0])["conversations"][-1]["role"] == "assistant"

    calls = []
    write_json = growing.write_json

    def die_at_third(path, value):
        calls.append(path)
        if len(calls) == 3:
            raise Killed
        write_json(path, value)

    monkeypatch.setattr(growing, "write_json", die_at_third)
    with pytest.raises(Killed):
        run(make_traces, *flags, "--out", tmp_path / "killed.jsonl")
    monkeypatch.setattr(growing, "write_json", write_json)
    run(make_traces, *flags, "--out", tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_traces_that_were_deleted_are_made_again(prepared_folder, teacher, tmp_path):
    """And a file that is not what its record says, or has none, is left as it is."""
    flags = ["--teacher", teacher, "--prompts", prepared_folder / "reason_prompts.jsonl"]
    flags += ["--keep", "all", "--temperature", "1", "--device", "cpu"]
    flags += ["--out", tmp_path / "x.jsonl"]
    run(make_traces, *flags)
    made = (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "x.jsonl").unlink()
    run(make_traces, *flags)
    assert (tmp_path / "x.jsonl").read_bytes() == made
    (tmp_path / "x.jsonl").write_bytes(made[:-5])
    with pytest.raises(ValueError, match=f"has {len(made) - 5:,} bytes, its record says"):
        run(make_traces, *flags)
    (tmp_path / "x.jsonl.progress.json").unlink()
    with pytest.raises(ValueError, match="is not a file to go on with"):
        run(make_traces, *flags)
    assert (tmp_path / "x.jsonl").read_bytes() == made[:-5]


# Ctrl-C.


@pytest.mark.skipif(sys.platform == "win32", reason="signals are delivered otherwise there")
def test_ctrl_c_saves_and_says_how_to_go_on(prepared_folder, tmp_path):
    command = [sys.executable, ROOT / "train_pretrain.py", "--model", "nano", *SMALL]
    command += ["--data", prepared_folder, "--out", tmp_path / "run", "--steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.time() + 60
    while not (tmp_path / "run" / "log.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    newest = max((tmp_path / "run" / "resume").glob("state-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert state["step"] >= 4
