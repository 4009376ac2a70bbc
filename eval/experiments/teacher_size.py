"""What teacher size does: one student, distilled from teachers of several sizes.

    python -m eval.experiments.teacher_size --preset quick

The smallest teacher has the student's own size: what it adds is not knowledge from more
parameters but the form of the target. Each teacher's own loss is a row beside its student's.
"""

from functools import partial

from .common import distilled, run_alone, teacher_of, text_experiment


def student_of(scale, seed, size):
    return distilled(scale, seed, teacher=teacher_of(scale, seed, size))


def experiment(scale):
    arms = []
    for size in reversed(scale.teacher_sizes):  # the longest runs first
        arms.append((f"teacher {size}", partial(teacher_of, scale, size=size)))
        arms.append((f"student of {size}", partial(student_of, scale, size=size)))
    return text_experiment(scale, "teacher_size", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
