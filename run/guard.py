"""A loss or gradient that is not finite never reaches the weights."""

from pathlib import Path

import torch

from files import write_json

from . import parallel

MOST_SKIPPED = 10  # in a row, with --on_nonfinite skip


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


class Guard:
    """Writes down a batch that failed, and decides whether the run may go on without it."""

    def __init__(self, args, student, device):
        self.args, self.student, self.device = args, student, device
        self.path, self.skipped = Path(args.out) / "nonfinite.json", 0  # batches left out in a row

    def on_nonfinite(self, step: int, batch, norm: torch.Tensor) -> str:
        """What happened, in words; raises ValueError unless the batch may be left out."""
        layer = first_nonfinite(self.student, batch.input_ids.to(self.device))
        about = {"step": step, "loss": str(float(batch.loss)), "gradient_norm": str(float(norm))}
        if parallel.is_main():
            about |= {"layer": layer, "input_ids": batch.input_ids.tolist()}
            write_json(self.path, about)
        self.skipped += 1
        message = f"the loss at step {step} is {batch.loss:g}, its gradient {norm:g} ({layer})"
        if self.args.on_nonfinite == "skip" and self.skipped <= MOST_SKIPPED and step > 1:
            return f"{message}: batch left out, see {self.path}"
        raise ValueError(
            f"{message}: lower --learning_rate ({self.args.learning_rate:g}) or --grad_clip; the "
            f"weights were not changed, the batch is in {self.path}"
        )
