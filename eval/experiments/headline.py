"""Does distillation help? At equal tokens, and at equal cost.

    python -m eval.experiments.headline --preset quick

    teacher                    a larger model, which has read several times what the students read
    plain                      the student, on text alone
    distilled                  the same student on the same tokens, and the teacher's distribution
    equal seconds              plain, for as long as the distilled student took
    equal flops                plain, for as many operations, the teacher's passes included
    equal seconds and teacher  plain, for as long as teacher and distilled student took together
    equal flops and teacher    plain, for as many operations as both

The students have one size and one initialisation. Which comparison is fair depends on whether the
teacher exists already: a downloaded one costs its passes only.
"""

from functools import partial

from .common import distilled, plain, run_alone, teacher_of, text_experiment
from .jobs import Spent


def equal_cost(scale, what: str, seed: int):
    """The plain student that costs what the distilled one has cost. what: as in Scale.equal."""
    student, column = distilled(scale, seed), what.split()[0]
    runs = (student, *student.needs) if "teacher" in what else (student,)
    name = f"equal-{what.replace(' ', '-')}"
    return plain(scale, seed, name=name, needs=runs, **{column: Spent(column, runs)})


def experiment(scale):
    arms = [
        ("teacher", partial(teacher_of, scale)),
        ("plain", partial(plain, scale)),
        ("distilled", partial(distilled, scale)),
        *((f"equal {what}", partial(equal_cost, scale, what)) for what in scale.equal),
    ]
    return text_experiment(scale, "headline", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
