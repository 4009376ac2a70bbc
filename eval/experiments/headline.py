"""Does distillation help? The plain student and the distilled one, and their teacher.

    python -m eval.experiments.headline --preset quick

All three read the same tokens; both students have one size and one initialisation.
"""

from .common import distilled, pretrained, run_alone, text_experiment


def experiment(scale):
    arms = [
        ("teacher", lambda seed: pretrained(scale, scale.teacher, seed)),
        ("plain", lambda seed: pretrained(scale, scale.student, seed)),
        # A seed that no other experiment has: its teacher has one student.
        ("distilled", lambda seed: distilled(scale, seed, live=seed >= scale.seeds)),
    ]
    return text_experiment(scale, "headline", arms, scale.headline_seeds)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
