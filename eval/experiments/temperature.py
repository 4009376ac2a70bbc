"""What temperature does: students distilled at several T, by the teacher alone (alpha = 0).

    python -m eval.experiments.temperature --preset quick

alpha = 0, so that nothing but the softened teacher is learned from. All runs of a seed share one
teacher.
"""

from functools import partial

from .common import distilled, run_alone, text_experiment


def experiment(scale):
    taught = partial(distilled, scale, alpha=0.0)
    arms = [(f"T={T:g}", partial(taught, temperature=T)) for T in scale.temperatures]
    return text_experiment(scale, "temperature", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
