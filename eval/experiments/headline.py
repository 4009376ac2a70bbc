"""Does distillation help? The plain student and the distilled one, and their teacher.

    python -m eval.experiments.headline --preset quick

All three read the same tokens; both students have one size and one initialisation.
"""

from .common import distilled, experiment_main, pretrained, run_experiments, text_experiment


def experiment(scale):
    arms = [
        ("teacher", lambda seed: pretrained(scale, scale.teacher, seed)),
        ("plain", lambda seed: pretrained(scale, scale.student, seed)),
        ("distilled", lambda seed: distilled(scale, seed)),
    ]
    return text_experiment(scale, "headline", arms, scale.headline_seeds)


def run(scale, results) -> None:
    run_experiments([experiment(scale)], results)


if __name__ == "__main__":
    experiment_main(__doc__, run)
