"""Does distillation help? The plain student and the distilled one, and their teacher.

    python -m eval.experiments.headline --preset quick

All read the same tokens but "plain, same flops", which reads on until it has cost as much as the
distilled student with its teacher's passes (not with its teacher's training). The students have one
size and one initialisation.
"""

from functools import partial

import torch

from model import ModelConfig, Transformer
from run.meter import CountFlops

from .common import distilled, pretrained, run_alone, text_experiment


def flops_of_distillation(scale) -> float:
    """Operations of the distilled student's run, counted on one window."""
    student, teacher = (
        Transformer(ModelConfig.preset(size, scale.vocab_size))
        for size in (scale.student, scale.teacher)
    )
    input_ids = torch.zeros(1, scale.seq_len, dtype=torch.long)
    with CountFlops() as counter:
        student(input_ids).sum().backward()
        with torch.no_grad():
            teacher(input_ids)
    return float(counter.flops * scale.text_batch * scale.text_steps)


def experiment(scale):
    flops = flops_of_distillation(scale)
    arms = [
        ("teacher", partial(pretrained, scale, scale.teacher)),
        ("plain", partial(pretrained, scale, scale.student)),
        ("distilled", partial(distilled, scale)),
        ("plain, same flops", partial(pretrained, scale, scale.student, flops=flops)),
    ]
    return text_experiment(scale, "headline", arms, scale.headline_seeds)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
