"""Killed at any moment (SIGKILL: no handler, no last word) and started again, every command ends
with the same bytes as one that was not: weights, log, CSV rows, traces, caches.

One kill for each command here; with --slow 54 in all."""

import csv
import json
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import train_pretrain
from eval.experiments.jobs import Job, execute

ROOT = Path(__file__).parent.parent
STEPS = ["--steps", "60", "--batch_size", "4", "--seq_len", "32", "--eval_every", "5"]
STEPS += ["--device", "cpu", "--dtype", "float32", "--no-compile", "--optimizer", "adamw"]
TIMES = ("seconds", "peak_memory_mb", "command", "device")  # that no two runs share
SWEEP = """
import dataclasses, sys
from pathlib import Path
from eval.experiments import common, headline, scales
if __name__ == "__main__":
    scale = dataclasses.replace(
        scales.SCALES["quick"], name="tiny", teacher="nano", student="nano", headline_seeds=2,
        text_steps=30, text_batch=4, seq_len=32, text_share=1.0,
    )
    common.run_experiments([headline.experiment(scale)], Path("results"))
"""


def command_of(name: str, data: Path, teacher: Path, out: Path) -> list:
    """The command that makes `out`; after a kill the same one goes on (training: --resume)."""
    traces = data / "reason_train.jsonl"
    return {
        "pretrain": ["train_pretrain.py", "--model", "nano", "--data", data, *STEPS],
        "distill": ["train_distillation.py", "--teacher", teacher, "--data", data, *STEPS],
        "reason": [
            *("train_distill_reason.py", "--student", "nano", "--tokenizer", data),
            *("--data", traces, *STEPS, "--seq_len", "256"),
        ],
        "traces": [
            *("-m", "dataset.make_traces", "--teacher", teacher, "--keep", "all"),
            *("--prompts", data / "reason_prompts.jsonl", "--device", "cpu"),
        ],
        "cache": [
            *("-m", "dataset.cache_teacher", "--teacher", teacher, "--data", data),
            *("--method", "sample", "--k", "8", "--seq_len", "8", "--device", "cpu"),
        ],
        "sweep": [str(out.parent / "sweep.py")],
    }[name] + ([] if name == "sweep" else ["--out", out])


def start(words, out: Path, log) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, words)]
    cwd = out.parent if words[1].endswith("sweep.py") else ROOT
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=log, stderr=log)


def prepare_sweep(folder: Path, data: Path) -> None:
    """Its data, and the precision that it would otherwise measure, once for each folder."""
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(data)
    (folder / "precision.json").write_text('{"dtype": "float32"}')


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
@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["pretrain", "distill", "reason", "traces", "cache", "sweep"])
def test_killed_and_started_again(name, kills, prepared_folder, kill_teacher, tmp_path):
    rng = random.Random(f"{name} {kills} {time.time_ns()}")
    results, seconds = [], None
    for label in ("whole", "killed"):
        out = tmp_path / label / "out"
        out.parent.mkdir()
        (out.parent / "sweep.py").write_text(SWEEP)
        if name == "sweep":
            (out.parent / "out" / "tiny").mkdir(parents=True)
            (out.parent / "out" / "tiny" / "data").symlink_to(prepared_folder)
        words = command_of(name, prepared_folder, kill_teacher, out)
        log = open(out.parent / "log", "w+")
        moments = []
        for _ in range(kills if label == "killed" else 0):
            # Not while Python starts: nothing of ours runs yet. The end may be passed.
            moments.append(rng.uniform(0.4, 1.1) * seconds)
            resume = ["--resume"] if words[0].startswith("train_") else []
            process = start([*words, *resume], out, log)
            time.sleep(moments[-1])
            process.kill()
            process.wait()
        resume = ["--resume"] if words[0].startswith("train_") and label == "killed" else []
        begun = time.perf_counter()
        code = start([*words, *resume], out, log).wait(timeout=300)
        seconds = seconds or time.perf_counter() - begun
        log.seek(0)
        assert code == 0, f"killed after {moments} s\n{log.read()[-3000:]}"
        results.append(result_of(name, out))
    assert results[0] == results[1], f"killed after {moments} s of {seconds}"


def test_two_sweeps_share_the_work(prepared_folder, tmp_path):
    """Started at once in one folder: every row once, every run made once."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    prepare_sweep(tmp_path / "out" / "tiny", prepared_folder)
    with open(tmp_path / "log", "w+") as log:
        words = [str(tmp_path / "sweep.py")]
        both = [start(words, tmp_path / "out", log) for _ in range(2)]
        codes = [process.wait(timeout=300) for process in both]
        log.seek(0)
        said = log.read()
    assert codes == [0, 0], said[-3000:]
    with open(tmp_path / "results" / "headline" / "results.csv", newline="") as file:
        rows = [(row["arm"], row["seed"]) for row in csv.DictReader(file)]
    assert sorted(rows) == sorted({(a, s) for a in ("teacher", "plain", "distilled") for s in "01"})
    finals = said.count("perplexity")
    assert finals == 4, said[-3000:]  # nano is both teacher and plain student here


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


LIMITED = """
import resource, runpy, sys
import torch.distributed.nn  # torch 2.9 writes a file when this is imported
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size there")
@pytest.mark.parametrize("limit", [500, 20_000, 300_000, 600_000])
def test_a_full_disk_loses_nothing(limit, prepared_folder, tmp_path):
    """A limit on the size of a file stands for the disk: config, tokenizer, weights and resume
    state fail in turn. Afterwards the run goes on and ends as if nothing had happened."""
    words = command_of("pretrain", prepared_folder, None, tmp_path / "run")
    # Through a pipe: a log would be a file with the same limit.
    limited = start(["-c", LIMITED, limit, *words], tmp_path / "run", subprocess.PIPE)
    said = b"".join(limited.communicate()).decode("utf-8")
    assert limited.returncode == 2
    assert "could not be written" in said and "make room on its disk" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("run/**/*.tmp"))
    with open(tmp_path / "log", "w") as log:
        assert start([*words, "--resume"], tmp_path / "run", log).wait() == 0
        words = command_of("pretrain", prepared_folder, None, tmp_path / "whole")
        assert start(words, tmp_path / "whole", log).wait() == 0
    assert result_of("pretrain", tmp_path / "run") == result_of("pretrain", tmp_path / "whole")
