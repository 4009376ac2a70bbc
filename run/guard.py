"""Where a loss or gradient that is not finite came from, and with which batch."""

from pathlib import Path

import torch

from files import write_json

from . import parallel


@torch.no_grad()
def first_nonfinite(student, input_ids: torch.Tensor) -> str:
    """The first module, in the order of the forward pass, that gives a value that is not finite."""
    names, found = {module: name for name, module in student.named_modules() if name}, []

    def watch(module, inputs, output):
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(names[module])

    hooks = [module.register_forward_hook(watch) for module in names]
    student(input_ids)
    for handle in hooks:
        handle.remove()
    return f"first in {found[0]}" if found else "the forward pass is finite"


def report_nonfinite(path: Path, student, step: int, batch, norm: torch.Tensor) -> str:
    """Write the batch that failed to `path`; returns what happened, in words."""
    layer = first_nonfinite(student, batch.input_ids.to(student.lm_head.weight.device))
    about = {"step": step, "loss": str(float(batch.loss)), "gradient_norm": str(float(norm))}
    if parallel.is_main():
        write_json(path, {**about, "layer": layer, "input_ids": batch.input_ids.tolist()})
    happened = f"the loss at step {step} is {batch.loss:g}, its gradient {norm:g} ({layer})"
    return f"{happened}, the batch in {path}"
