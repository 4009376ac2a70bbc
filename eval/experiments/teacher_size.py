"""What teacher size does: one student, distilled from teachers of several sizes.

    python -m eval.experiments.teacher_size --preset quick

The smallest teacher has the student's own size: what it adds is not knowledge from more
parameters but the form of the target. Each teacher's own loss is a row beside its student's.
"""

from functools import partial

from .common import distilled, pretrained, run_alone, text_experiment


def experiment(scale):
    arms = []
    for size in reversed(scale.teacher_sizes):  # the longest runs first
        arms.append((f"teacher {size}", partial(pretrained, scale, size)))
        arms.append((f"student of {size}", partial(distilled, scale, teacher_size=size)))
    return text_experiment(scale, "teacher_size", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
