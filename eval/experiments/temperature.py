"""What temperature does: students distilled at several T, by the teacher alone (alpha = 0).

    python -m eval.experiments.temperature --preset quick

alpha = 0, so that nothing but the softened teacher is learned from. All runs share one teacher
for each seed, and its cached hidden states.
"""

from .common import distilled, run_alone, text_experiment


def experiment(scale):
    arms = [
        (f"T={T:g}", lambda seed, T=T: distilled(scale, seed, temperature=T, alpha=0.0))
        for T in scale.temperatures
    ]
    return text_experiment(scale, "temperature", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
