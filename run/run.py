"""One training run in seven words; every lesson and method is written with them.

    run = Run(args)                        flags are checked, device, precision and seed settled
    teacher = run.teacher(folder, data)    a frozen model that reads the data's tokens
    student = run.student(name, data)      new, a checkpoint, or some layers of the teacher
    run.optimize(student, *more)           what learns, and what else is kept with it
    for batch in run.batches(data):        micro-batches; between steps evaluation, log, saved state
        with run.precision(): ...          the forward pass
        run.step(loss, **parts)            backward; at a batch's end the update
    run.finish()                           the last evaluation, the weights and run.json

Each word is a few lines that call a module named after what it does. Data is any object with
`batch(step, batch_size, seed)`, `held_out.evaluation(batch_size, most)`, and the attributes
`vocab_size`, `tokenizer_folder`, `tokenizer_sha256`, `sha256`, `bytes_per_token` and `padded`; and
`files`, where it was read from some.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from files import check_apart, git_state, hashes
from model import (
    PRESETS,
    layers_named,
    load_for,
    make_or_load,
    store_weights,
    stored_bytes,
    weights_hash,
)  # fmt: skip
from model import device as machine
from model.checkpoint import checkpoint_files

from . import parallel, shards
from .batches import Accumulated, count_parts, micro_batches
from .flags import check_flags, choose_optimizer
from .optimizer import Optimizer
from .phases import add_phases
from .signals import noted_signals
from .training import Training


class Run:
    """Keeps everything about a training run that its lesson is not about."""

    def __init__(self, args):
        parallel.start()
        check_flags(args)
        check_apart(args, PRESETS)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
        machine.prepare_process(args.seed, processes)
        local_rank = int(os.environ["LOCAL_RANK"]) if parallel.world_size() > 1 else None
        self.args, self.device = args, machine.choose_device(args.device, local_rank)
        args.dtype = machine.choose_precision(args.dtype, self.device)
        self.training = Training(args, self.device)
        self.teachers: list[nn.Module] = []
        self.teacher_folders: list = []
        self.sources: dict[str, str | list[str]] = {}  # hashes of what the run is made from

    def teacher(self, folder, data) -> nn.Module:
        """The frozen model of a checkpoint folder, its weights kept in --teacher_dtype. Raises
        ValueError without one, or where its tokenizer is not the data's."""
        dtype = getattr(self.args, "teacher_dtype", "float32")
        stored = torch.float32 if dtype == "float32" else None  # as in the file: never larger
        model = store_weights(load_for(folder, data, dtype=stored), dtype)
        if dtype != "float32":
            print(f"{folder}: its weights take {stored_bytes(model) / 1e6:,.1f} MB as {dtype}")
        self.teacher_folders.append(folder)
        self.sources.setdefault("teacher_sha256", []).append(weights_hash(folder))
        self.training.folder.made_from |= hashes(*checkpoint_files(folder))
        self.teachers.append(self.to_device(model))
        return self.teachers[-1]

    def student(self, name: str | nn.Module, data) -> nn.Module:
        """A new model of the preset `name`, the checkpoint in the folder `name`, of "layers:N" that
        many of the (first) teacher's layers, or a model that a method has made. The first student
        of a run is the one that is saved in --out and evaluated on the way. Raises ValueError where
        the checkpoint's tokenizer is not the data's."""
        is_made, source = isinstance(name, nn.Module), name
        if not is_made and layers_named(name):
            source = (self.teacher_folders or [getattr(self.args, "teacher", None)])[0]
            if source is None:
                cure = "--teacher FOLDER" if "teacher" in self.args else "a command with --teacher"
                raise ValueError(f"{name} is a student made of a teacher's layers: use {cure}")
        model = name if is_made else make_or_load(name, data.vocab_size, data, source)
        if not is_made and name not in PRESETS:
            self.training.folder.made_from |= hashes(*checkpoint_files(source))
            self.training.begun_from.append(source)
        if not self.training.students:
            choose_optimizer(self.args, None if is_made else name, model.config.hidden_size)
        self.training.students.append(self.to_device(model))
        return self.training.students[-1]

    def to_device(self, model: nn.Module) -> nn.Module:
        model = shards.shard_model(model, self.device) if self.args.fsdp else model.to(self.device)
        if self.args.compile:
            model.model.compile()
        return model

    def optimize(self, *modules: nn.Module, **flags) -> None:
        """Let modules learn, and keep their state. Frozen ones (an EMA copy) are only kept. Called
        once more it makes a second optimizer; `flags` replace the run's (learning_rate=...)."""
        modules = [module.to(self.device).train() for module in modules]
        self.training.modules += modules
        args = type(self.args)(**{**vars(self.args), **flags})
        self.training.optimizers.append(Optimizer(modules, args))

    def precision(self):
        """A context for forward passes in --dtype; weights and losses stay float32."""
        return machine.autocast(self.device, self.args.dtype)

    def batches(self, data, sample: Callable | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches on the device until the budget is spent, under a progress bar.

        sample(*batch, generator) -> batch: replaces each batch by one that is made from what the
        student says; called without gradients, a function of (weights, seed, step). Ctrl-C and
        SIGTERM end the loop after the step that is running: the state is saved."""
        args, training, meter = self.args, self.training, self.training.meter
        self.sources |= {"data_sha256": data.sha256, "tokenizer_sha256": data.tokenizer_sha256}
        training.folder.made_from |= hashes(*getattr(data, "files", ()))
        training.begin(data, *self.teachers[:1])
        parts = count_parts(args.batch_size, args.accumulation_steps, data.padded)
        with noted_signals() as signals, training.progress:
            while not training.is_over():
                batch = data.batch(training.step, args.batch_size, args.seed)
                if sample is not None:
                    batch = self.sampled(sample, batch)
                self.batch = Accumulated(batch, self.device)
                pieces = list(micro_batches(batch, parts, data.padded and sample is None))
                for number, (piece, self.piece_labels) in enumerate(pieces, start=1):
                    self.is_last = number == len(pieces)
                    piece = tuple(x.to(self.device) for x in piece)
                    with ExitStack() as self.metering:  # until `step`
                        kind = f"batch {tuple(piece[0].shape)}"
                        self.metering.enter_context(meter.count(kind, piece[0].numel()))
                        self.stepped = False
                        yield piece
                        assert self.stepped, "every micro-batch needs one run.step(loss)"
                training.after_step(self.batch, bool(signals))

    def sampled(self, sample: Callable, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seed = self.args.seed * 2**32 + self.training.step
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = (x.to(self.device) for x in batch)
        counted = self.training.meter.count("sampling", 1)
        with torch.no_grad(), self.precision(), machine.not_compiled(self.args.compile), counted:
            return sample(*batch, generator)

    def step(self, loss: Tensor, weight: Tensor | None = None, **parts: Tensor | float) -> bool:
        """Add the gradient of this micro-batch's loss; with the batch's last one, change the
        weights. Returns whether it did.

        loss: a mean over `weight` things, by default the labels that are not -100. Micro-batches
        and processes count by it, so a batch has one loss however it is cut. parts: named means
        over the same things, for the log."""
        self.batch.add(loss, parts, self.piece_labels, weight)
        self.metering.close()
        self.stepped = True
        if self.is_last:
            self.training.update(self.batch)
        return self.is_last

    def finish(self, **more: Callable[[], float]) -> dict:
        """Evaluate beside the teacher, write the last weights and run.json; returns the record.
        more: a method's own metrics, called when the clock has stopped."""
        training, meter = self.training, self.training.meter
        teacher = self.teachers[0] if self.teachers else None
        seconds = round(meter.seconds(), 2)  # of training, not of the last evaluation
        costs = {"tokens": meter.tokens, "flops": meter.flops, "seconds": seconds}
        metrics = training.evaluate(self.args.final_eval, teacher)
        metrics |= {name: measure() for name, measure in more.items()}
        record = {
            "argv": sys.argv, "args": training.folder.flags, "seed": self.args.seed, **git_state(),
            "config": training.students[0].config.to_json(), "sources": self.sources,
            "made_from": training.folder.made_from,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": machine.describe_device(self.device), "threads": torch.get_num_threads(),
            "processes": parallel.world_size(), "parameters": training.students[0].num_parameters(),
            "steps": training.step, **add_phases(self.args, costs),
            "peak_memory_mb": machine.peak_memory_mb(self.device),
            "best_val_loss": training.best_loss if training.best_step else None,
            "best_step": training.best_step,
            "metrics": metrics,
        }  # fmt: skip
        training.finish(record)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{self.args.out}: {shown}, {record['seconds']:.0f} s")
        return record
