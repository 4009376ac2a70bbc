"""Training runs as values: what to run, after what, and a pool that runs them.

A `Job` is one call of a script's own `main` with its flags; two experiments that need the same
run name the same Job, and it runs once. On a CPU small models leave cores idle, so several jobs
run side by side, each on its share of the cores; on a GPU they run one after another.
"""

import importlib
import os
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.teacher_cache import read_header
from files import Finished, Locked, check_unchanged, lock, progress, read_json, unlock_all
from model.device import available_cores, give_back_memory

at_once: int | None = None  # runs side by side, where --jobs says so
# Of what a script writes, where it is no run's folder: what is added to the name of --out.
RECORDS = {"dataset.teacher_cache": "", "dataset.make_traces": ".finished.json"}


@dataclass(frozen=True)
class Job:
    """script: a module with parse_args and main, as `python script.py` or `python -m package.x`.
    out: what it writes. flags: (name, value) pairs; value None for a switch that is on, False for
    one that is off."""

    script: str
    out: str
    flags: tuple[tuple[str, object], ...]
    needs: tuple["Job", ...] = ()

    @property
    def argv(self) -> list[str]:
        words = []
        for name, value in self.flags:
            value = value.total() if isinstance(value, Spent) else value
            words.append(f"--no-{name}" if value is False else f"--{name}")
            if value is not None and value is not False:
                words.append(str(value))
        return [*words, "--out", self.out]

    @property
    def command(self) -> str:
        module = f"-m {self.script}" if "." in self.script else f"{self.script}.py"
        return f"python {module} {shlex.join(self.argv)}"

    @property
    def record_path(self) -> Path:
        """The file that exists once the job is done, and says how it was made."""
        return Path(self.out + RECORDS.get(self.script, "/run.json"))

    def record(self) -> dict:
        """Its "args", and "made_from", the hashes of the files that it read."""
        if self.script == "dataset.teacher_cache":
            header, flags = read_header(self.record_path), dict(self.flags)
            made_from = {f"{flags['teacher']}/model.safetensors": header["teacher_sha256"]}
            made_from[f"{flags['data']}/train.bin"] = header["text_sha256"]
            return {"args": header, "made_from": made_from}
        record = read_json(self.record_path, args=dict)
        return {"made_from": record["args"].get("made_from", {}), **record}

    def is_done(self) -> bool:
        """Raises ValueError where --out holds a run with other flags, or of files that have changed
        since. Those that are gone are not asked for: the result may be all that was kept."""
        if not self.record_path.is_file():
            return False
        record = self.record()
        recorded = record["args"].get("given", record["args"])  # of a chain, the whole one's
        for name, value in self.flags:
            value = value.total() if isinstance(value, Spent) else value
            expected = str(True if value is None else value)
            if name in recorded and str(recorded[name]) != expected:
                raise ValueError(
                    f"{self.out} holds a run with --{name} {recorded[name]}, this experiment "
                    f"needs {expected}: move or delete it"
                )
        made_from = record.get("made_from", {})  # runs of earlier versions have none
        kept = {path: digest for path, digest in made_from.items() if Path(path).is_file()}
        check_unchanged(kept, self.out, "put that back, or move or delete the run to make it again")
        return True


@dataclass(frozen=True)
class Spent:
    """The value of a flag that is known once other runs are done: what they cost together."""

    column: str  # "seconds" or "flops"
    runs: tuple[Job, ...]

    def total(self) -> float:
        return float(f"{sum(job.record()[self.column] for job in self.runs):.6g}")


def execute(job: Job) -> None:
    """Run one job in this process; what it had begun before is resumed."""
    module = importlib.import_module(job.script)
    give_back_memory()
    while True:
        try:
            lock(job.out)  # before looking: another sweep may be about to begin or finish it
            begun = job.script not in RECORDS and Path(job.out).is_dir()
            module.main(module.parse_args([*job.argv, *(["--resume"] if begun else [])]))
            return
        except Finished:
            return
        except Locked:  # another sweep runs it: it will finish, or leave a state to go on from
            time.sleep(2)
        finally:
            unlock_all()  # this worker lives on, and another sweep's may wait for the folder


def start_worker(threads: int, tqdm_lock, positions) -> None:
    """Settle a worker process: its threads, its own line for the progress bar, its end."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(tqdm_lock)
    with positions.get_lock():
        progress.position = positions.value
        positions.value += 1


def end_with_parent() -> None:
    """A sweep that was killed must not leave workers behind, which hold its runs' folders."""
    parent_process().join()
    os._exit(1)


def run_jobs(jobs: list[Job], after_each: Callable[[], None] = lambda: None) -> None:
    """Run all jobs and what they need, each once, those it needs first; print every command.

    One runs at a time where there is a GPU, else one for every core up to 4, or as many as
    `at_once` says. after_each is called whenever a job has finished, in a thread of its own: it may
    take seconds, in which no worker should wait. Raises what a job or after_each raised; the other
    running jobs finish first.
    """
    waiting = unfinished(jobs)
    if not waiting:
        return
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    workers = at_once or (1 if gpu else min(4, available_cores()))
    threads = max(1, available_cores() // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import torch
    context = get_context("spawn")
    shared = (threads, context.RLock(), context.Value("i", 1))
    running, calls = {}, []
    with (
        progress.progress_bar(len(waiting), "runs", unit="run") as bar,
        ProcessPoolExecutor(workers, context, start_worker, shared) as pool,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as thread,
    ):
        while waiting or running:
            missing = {*waiting, *running.values()}
            ready = [job for job in waiting if missing.isdisjoint(job.needs)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                bar.write("$ " + job.command)
                running[pool.submit(execute, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                if future.exception():
                    bar.write(f"failed: {job.command}")
                future.result()
                bar.update()
            calls.append(thread.submit(after_each))
            for call in calls:
                if call.done() or workers == 1:  # a GPU has memory for one thing at a time
                    call.result()
        for call in calls:
            call.result()


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs that must run, without repeats, every one after those it needs."""

    def with_needs(job: Job) -> list[Job]:
        return [*(first for need in job.needs for first in with_needs(need)), job]

    ordered = dict.fromkeys(found for job in jobs for found in with_needs(job))
    return [job for job in ordered if not job.is_done()]
