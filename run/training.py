"""What learns in a run, and how far it has come: the update, evaluation, and the saved state."""

import math
import time
from pathlib import Path

import torch
from torch import nn

from files.atomic import copy_terms
from model import save_model
from model.device import give_back_memory, not_compiled

from . import parallel, shards
from .batches import Accumulated
from .checkpoint import RunFolder
from .evaluation import evaluate
from .guard import report_nonfinite
from .log import Log
from .meter import Meter
from .optimizer import Optimizer, learning_rate

LOG_EVERY, TRIM_EVERY = 10, 1000  # steps between logged ones, and between returns of freed memory
MOST_SKIPPED = 10  # batches in a row, with --on_nonfinite skip
CURE = "lower --learning_rate ({:g}), or try --grad_clip 0.1"
EVALUATED = 100  # held-out sequences of an evaluation during training, or --final_eval if less


class Training:
    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.folder, self.log, self.meter = RunFolder(args), Log(Path(args.out)), Meter(args)
        self.students: list[nn.Module] = []
        self.begun_from: list = []  # folders whose weights students began as
        self.modules: list[nn.Module] = []  # whose state is kept
        self.optimizers: list[Optimizer] = []
        self.step, self.saved_step = 0, None  # steps done, and how many the newest state has
        self.rate, self.best_loss, self.best_step = 0.0, float("inf"), 0
        self.last: Accumulated | None = None  # the last batch that was learned from
        self.skipped = 0  # batches left out in a row
        self.few = min(EVALUATED, args.final_eval)

    def begin(self, data, teacher=None) -> None:
        """Refuse to lose a run that is already there; go on with it under --resume. A new one says
        first how well the teacher itself knows the data."""
        self.data = data
        state, source = self.folder.open(self.args.resume, self.args.overwrite)
        if state is not None:
            try:
                self.load_state_dict(state)
            except KeyError as error:
                other = f"{source} has no {error}: another version wrote it"
                raise ValueError(f"{other}; start again with --overwrite") from None
            print(f"{self.args.out}: resuming after step {self.step}, from {source}")
        elif teacher is not None:
            metrics = self.evaluate(self.few, teacher)
            both = "{teacher_loss:.4g}, student {val_loss:.4g}".format(**metrics)
            print(f"held-out loss before the first step: teacher {both}")
        self.progress = self.log.bar(self.meter.total_steps(self.step), self.step)
        self.meter.started = time.perf_counter()  # models and data are loaded

    def state_dict(self) -> dict:
        """To be called by all processes: what is sharded is gathered."""
        return {
            "modules": [shards.gather(dict(module.state_dict())) for module in self.modules],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "meter": self.meter.state_dict(), "rows": self.log.rows, "step": self.step,
            "best_loss": self.best_loss, "best_step": self.best_step,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        for module, before in zip(self.modules, state["modules"], strict=True):
            now = module.state_dict()
            module.load_state_dict({k: shards.shard(before[k], now[k]) for k in before})
        for optimizer, before in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(before)
        self.meter.load_state_dict(state["meter"])
        self.log.rows, self.step = state["rows"], state["step"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]

    def save_state(self) -> None:
        state = self.state_dict()
        if parallel.is_main():
            self.folder.save_state(self.step, state)
            self.log.write()
        self.saved_step = self.step
        parallel.barrier()  # whoever goes on, or ends, finds it written

    def update(self, batch: Accumulated) -> None:
        """Change the weights by a batch's gradient, unless that is not finite. On CUDA the step
        does not wait to find out: such a gradient counts 0, and the next logged step reports it."""
        scale = batch.denominator()
        norm = torch.stack([optimizer.clip(scale) for optimizer in self.optimizers]).max()
        finite = norm.isfinite() & (batch.loss.isfinite() if parallel.world_size() == 1 else True)
        if self.device.type == "cuda" and (self.step + 1) % LOG_EVERY:
            for optimizer in self.optimizers:
                optimizer.clear_where(~finite)
        elif not finite:
            for optimizer in self.optimizers:
                optimizer.clear()
            self.rate, self.skipped = 0.0, self.skipped + 1
            path, student = self.folder.path / "nonfinite.json", self.students[0]
            message = report_nonfinite(path, student, self.step + 1, batch, norm)
            if self.args.on_nonfinite == "stop" or self.skipped > MOST_SKIPPED or self.step == 0:
                cure = CURE.format(self.args.learning_rate)
                raise ValueError(f"{message}; the weights were not changed: {cure}")
            self.progress.write(f"{message}: batch left out")
            return
        self.skipped, self.last = 0, batch
        steps = self.meter.total_steps(self.step)
        for optimizer in reversed(self.optimizers):  # the first one's rate is logged
            self.rate = learning_rate(self.step, steps, optimizer.args)
            optimizer.update(self.rate)

    def after_step(self, batch: Accumulated, stopped: bool) -> None:
        """Count the step; log, evaluate and save where it is time to."""
        self.step, self.last = self.step + 1, self.last or batch
        if self.meter.end_step(self.step, batch.labels):
            self.progress.total = self.meter.planned_steps
            self.progress.write(f"--seconds {self.args.seconds:g}: {self.progress.total} steps")
        evaluates = self.step % self.args.eval_every == 0 or self.meter.is_spent(self.step)
        if evaluates or self.step % LOG_EVERY == 0 or self.step == 1:
            loss, parts = self.finite_totals()
            row = {"step": self.step, "tokens": self.meter.tokens, "flops": self.meter.flops}
            row |= {"seconds": round(self.meter.seconds(), 2), "train_loss": loss}
            self.log.add(self.progress, {**row, "learning_rate": self.rate}, parts)
        if self.step % TRIM_EVERY == 0:
            give_back_memory()
        if evaluates:
            loss = parallel.broadcast_from_rank0(self.evaluate(self.few)["val_loss"])
            self.log.rows[-1]["val_loss"] = loss
            if loss < self.best_loss:
                self.best_loss, self.best_step = loss, self.step
                self.save_models(self.folder.path / "best")
            self.save_state()
        self.progress.update()
        if parallel.any_rank(stopped):
            self.finite_totals()
            if self.saved_step != self.step:
                self.save_state()
            again = "go on with the same command and --resume"
            again += " instead of --overwrite" if self.args.overwrite else ""
            raise KeyboardInterrupt(f"saved at step {self.step}; {again}")

    def finite_totals(self) -> tuple[float, dict[str, float]]:
        """The last loss and its parts, of all processes; raises ValueError before what a diverged
        step left is saved."""
        loss, parts = self.last.totals()
        if not math.isfinite(loss):
            cure = CURE.format(self.args.learning_rate)
            raise ValueError(f"the loss at step {self.step} is {loss}: {cure}; nothing was saved")
        return loss, parts

    def is_over(self) -> bool:
        waited = (self.step - self.best_step) // self.args.eval_every
        patience = self.args.patience > 0 and self.best_step > 0 and waited >= self.args.patience
        return patience or self.meter.is_spent(self.step)

    def evaluate(self, most: int, teacher=None) -> dict[str, float]:
        """Metrics on held-out data, of the first student, and under other names of the others. Says
        so where a teacher knows the data less well than the student."""
        metrics, held_out = {}, self.data.held_out
        for number, student in enumerate(self.students, start=1):
            batches = held_out.evaluation(self.args.batch_size, most)
            with not_compiled(self.args.compile):
                found = evaluate(student, batches, held_out.bytes_per_token, teacher)
            metrics |= {f"{k}_{number}" if number > 1 else k: v for k, v in found.items()}
        if metrics.get("teacher_loss", 0.0) > metrics["val_loss"]:
            worse = "the teacher is worse on this data than its student, {teacher_loss:.4g} to "
            worse += "{val_loss:.4g}: one that was first trained on it has more to teach"
            print(worse.format(**metrics))
        return metrics

    def save_models(self, folder: Path) -> None:
        for number, student in enumerate(self.students, start=1):
            state = shards.gather(dict(student.state_dict()))
            if parallel.is_main():
                target = folder / f"student{number}" if number > 1 else folder
                save_model(student, target, self.data.tokenizer_folder, state)
                for source in self.begun_from:
                    copy_terms(source, target)

    def finish(self, record: dict) -> None:
        self.save_models(self.folder.path)
        if parallel.is_main():
            self.log.write()
            self.folder.finish(record)
        parallel.barrier()
