"""The folder of a run: log, checkpoints, resume, record.

    config.json, model.safetensors, tokenizer.json ...   the last weights: a Hugging Face folder
    best/                                                 the same, of the lowest held-out loss
    log.csv                                               one row per logged step
    run.json                                              what ran, where, and what came out
    resume/                                               only while the run is unfinished

A state (run/state.py) holds everything that the next step depends on: weights, optimizer, step,
best loss and the log so far. Batches depend on (data, seed, step) alone, so the data position is
the step, and a run that was killed and resumed ends with the same bits as one that was not.
"""

import csv
import json
import math
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import parallel, shards
from .files import Finished, atomic_path, hold, read_json, write_json
from .optim import Optimizer
from .record import describe_device, git_state
from .setup import give_back_memory, peak_memory_mb
from .state import OtherFlags, newest_state, write_state

LOG_EVERY, TRIM_EVERY = 10, 100
MOST_SKIPPED = 10  # in a row, with --on_nonfinite skip
bar_position = None  # the line of this process's progress bar, where several run at once
NOT_IN_RESULT = ("out", "resume", "overwrite", "fsdp")  # flags that do not change what is computed
LOG_COLUMNS = ("step", "tokens", "train_loss", "learning_rate", "val_loss", "seconds")


@torch.no_grad()
def first_nonfinite(student, input_ids: torch.Tensor) -> str:
    """The first module, in the order of the forward pass, that gives a value that is not finite."""
    found = []

    def watch(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in student.named_modules() if name]
    student(input_ids)
    for handle in hooks:
        handle.remove()
    return f"first in {found[0]}" if found else "the forward pass is finite"


class Run:
    """Keeps the record of one training run; the training itself stays in the script."""

    def __init__(self, args, student, optimizer: Optimizer, device, save_model):
        """save_model(folder) writes the student's checkpoint."""
        self.args, self.student, self.optimizer, self.device = args, student, optimizer, device
        self.save_model = save_model
        self.out = Path(args.out)
        self.flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.step, self.saved_step = 0, None  # steps done, and how many the newest state has
        self.tokens = 0  # labels learned from
        self.best_loss, self.best_step = float("inf"), 0
        self.earlier_seconds = 0.0
        self.rows: list[dict] = []
        self.stop_signal = None
        self.skipped = 0  # batches left out in a row, for what was not finite
        self.prepare_folder()
        self.started = time.perf_counter()

    # Start and resume.

    def prepare_folder(self) -> None:
        """Refuse to lose a run that is already there; continue it with --resume."""
        if parallel.is_main():
            hold(self.out)
        record, states = self.out / "run.json", list(self.out.glob("resume/state-*.pt"))
        if self.args.resume:
            if record.is_file():
                self.check_same_flags(read_json(record)["args"])
                raise Finished(f"{self.out}: finished already, nothing to resume")
            if states:
                self.load_newest_state()
            else:
                print(f"{self.out}: no state to resume, starting at step 0")
        elif record.is_file() or states:
            if not self.args.overwrite:
                raise ValueError(
                    f"{self.out} already holds a run: pass --resume to go on with it, --overwrite "
                    "to replace it, or another --out"
                )
            if parallel.is_main():
                record.unlink(missing_ok=True)
                shutil.rmtree(self.out / "resume", ignore_errors=True)
        parallel.barrier()  # nothing is written before all processes have read
        if parallel.is_main():
            for left in self.out.glob("**/*.tmp"):  # of a process that was killed
                left.unlink()
            write_json(self.out / "resume" / "flags.json", self.flags)

    def check_same_flags(self, before: dict) -> None:
        for name, value in self.flags.items():
            if name not in NOT_IN_RESULT and before.get(name) != value:
                raise OtherFlags(
                    f"cannot resume {self.out} with --{name} {value}: it ran with "
                    f"{before.get(name)}; use that, or another --out"
                )

    def load_newest_state(self) -> None:
        path, state, refused = newest_state(self.out / "resume")
        try:
            self.load_state(state)
        except KeyError as error:
            raise ValueError(
                f"{path} has no {error}: another version wrote it; start again with --overwrite"
            ) from None
        before = f"; {'; '.join(refused)}" if refused else ""
        print(f"{self.out}: resuming after step {self.step}, from {path.name}{before}")

    def load_state(self, state: dict) -> None:
        self.check_same_flags(json.loads(state["flags"]))
        now, before = self.student.state_dict(), state["student"]
        self.student.load_state_dict({k: shards.shard(before[k], now[k]) for k in before})
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self.rows, self.earlier_seconds = json.loads(state["rows"]), state["seconds"]

    def save_state(self) -> None:
        state = {
            "student": shards.gather(self.student.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "seconds": self.seconds(),
            "rows": json.dumps(self.rows),
            "flags": json.dumps(self.flags),
        }
        if parallel.is_main():
            write_state(self.out / "resume", self.step, state)
            self.write_log()
        self.saved_step = self.step
        parallel.barrier()  # whoever goes on, or ends, finds it written

    # The loop.

    def steps(self) -> Iterator[int]:
        """Yield the number of every step that is left, under a progress bar.

        Ctrl-C and SIGTERM end the loop after the step that is running: the state is saved, and
        the command that goes on is printed.
        """
        self.student.train()
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self.note_signal)
        bar = tqdm(
            total=self.args.steps,
            initial=self.step,
            desc=self.out.name,
            mininterval=0.5,
            position=bar_position,
            leave=bar_position is None,
            disable=not parallel.is_main(),
        )
        try:
            with bar as self.bar:
                while self.step < self.args.steps and not self.patience_is_over():
                    yield self.step
                    self.bar.update()
                    if parallel.any_rank(self.stop_signal is not None):
                        self.check_finite()
                        if self.saved_step != self.step:
                            self.save_state()
                        raise KeyboardInterrupt(
                            f"saved at step {self.step}; go on with the same command and --resume"
                        )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def note_signal(self, number, frame) -> None:
        self.stop_signal = number

    def update(self, loss: torch.Tensor, tokens: int, input_ids: torch.Tensor) -> bool:
        """Change the weights by the gradient of `loss`; returns whether it is time to evaluate.

        A loss or gradient that is not finite never reaches the weights: the run stops, or with
        --on_nonfinite skip leaves the batch out. On CUDA the step does not wait to find out: such a
        gradient counts 0, and the next logged step reports it.
        """
        norm = self.optimizer.clip()
        finite = norm.isfinite() & (loss.isfinite() if parallel.world_size() == 1 else True)
        if self.device.type == "cuda" and (self.step + 1) % LOG_EVERY:
            self.optimizer.clear_where(~finite)
        elif not finite:
            self.broken(float(loss), float(norm), input_ids)
            self.optimizer.clear()
            return self.log(self.last_loss, 0.0, tokens)
        self.skipped = 0
        return self.log(loss, self.optimizer.update(self.step), tokens)

    def broken(self, loss: float, norm: float, input_ids: torch.Tensor) -> None:
        """Write down the batch; raise ValueError unless it may be skipped."""
        self.optimizer.clear()
        number, path = self.step + 1, self.out / "nonfinite.json"
        layer = first_nonfinite(self.student, input_ids.to(self.device))
        about = {"step": number, "loss": str(loss), "gradient_norm": str(norm), "layer": layer}
        if parallel.is_main():
            write_json(path, {**about, "input_ids": input_ids.tolist()})
        self.skipped += 1
        told = f"the loss at step {number} is {loss:g}, its gradient {norm:g} ({layer})"
        if self.args.on_nonfinite == "skip" and self.skipped <= MOST_SKIPPED and number > 1:
            self.bar.write(f"{told}: batch left out, see {path}")
            return
        raise ValueError(
            f"{told}: lower --learning_rate ({self.args.learning_rate:g}) or --grad_clip; the "
            f"weights were not changed, the batch is in {path}"
        )

    def log(self, loss: torch.Tensor, rate: float, tokens: int) -> bool:
        """Count the step that was just made; returns whether it is time to evaluate."""
        self.step += 1
        self.tokens += tokens
        self.last_loss = loss.detach()
        evaluate = self.step % self.args.eval_every == 0 or self.step == self.args.steps
        if evaluate or self.step % LOG_EVERY == 0 or self.step == 1:
            value = self.check_finite()
            self.rows.append(
                {
                    "step": self.step,
                    "tokens": self.tokens,
                    "train_loss": value,
                    "learning_rate": rate,
                    "val_loss": None,
                    "seconds": round(self.seconds(), 2),
                }
            )
            speed = self.tokens / self.seconds()
            self.bar.set_postfix_str(f"loss {value:.3f}, {speed:,.0f} tokens/s", refresh=False)
        if self.step % TRIM_EVERY == 0:
            give_back_memory()
        return evaluate

    def check_finite(self) -> float:
        """The last loss, of all processes; raises ValueError before weights are saved over by
        what a diverged step left."""
        value = float(parallel.total(self.last_loss))
        if not math.isfinite(value):
            raise ValueError(
                f"the loss at step {self.step} is {value}: lower --learning_rate "
                f"({self.args.learning_rate:g}) or --grad_clip; nothing was saved over"
            )
        return value

    def evaluated(self, val_loss: float) -> None:
        """Record a held-out loss; keep the weights if it is the lowest so far; save the state."""
        val_loss = parallel.of_main(val_loss)
        self.rows[-1]["val_loss"] = val_loss
        if val_loss < self.best_loss:
            self.best_loss, self.best_step = val_loss, self.step
            self.save_model(self.out / "best")
        self.save_state()
        self.student.train()

    def patience_is_over(self) -> bool:
        waited = (self.step - self.best_step) // self.args.eval_every
        return self.args.patience > 0 and self.best_step > 0 and waited >= self.args.patience

    # The end.

    def finish(self, config: dict, metrics: dict) -> dict:
        """Write the last weights and run.json, remove the resume state; returns the record."""
        self.save_model(self.out)
        record = {
            "argv": sys.argv,
            "args": self.flags,
            "config": config,
            "seed": self.args.seed,
            **git_state(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": describe_device(self.device),
            "threads": torch.get_num_threads(),
            "processes": parallel.world_size(),
            "parameters": self.student.num_parameters(),
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds(), 2),
            "peak_memory_mb": peak_memory_mb(self.device),
            "best_val_loss": self.best_loss,
            "best_step": self.best_step,
            "metrics": metrics,
        }
        if parallel.is_main():
            self.write_log()
            write_json(self.out / "run.json", record)
            shutil.rmtree(self.out / "resume", ignore_errors=True)
        parallel.barrier()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{self.out}: {shown}, {record['seconds']:.0f} s")
        return record

    def seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def write_log(self) -> None:
        with atomic_path(self.out / "log.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, LOG_COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)
