"""What a teacher's reading is worth: one student, taught by teachers that have read more or less.

    python -m eval.experiments.teacher_reading --preset standard

Teachers have one size; they read from half of what the student reads to several times as much.
Column teacher_tokens has how much.
"""

from functools import partial

from .common import Experiment, distilled, reference, run_alone, teacher_of, text_row


def student_of(scale, seed, reading):
    return distilled(scale, seed, teacher=teacher_of(scale, seed, reading=reading))


def row(scale, job) -> dict:
    (teacher,) = job.needs or (job,)
    return {"teacher_tokens": teacher.record()["tokens"], **text_row(scale, job)}


def experiment(scale) -> Experiment:
    arms = []
    for times in reversed(scale.readings):  # the longest runs first
        arms.append((f"teacher x{times:g}", partial(teacher_of, scale, reading=times)))
        arms.append((f"student of x{times:g}", partial(student_of, scale, reading=times)))
    rows, beside = partial(row, scale), partial(reference, scale)
    return Experiment("teacher_reading", arms, scale.seeds, rows, beside)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
