"""What alpha does: from the teacher alone (0) to the labels alone (1), at T = 1.

    python -m eval.experiments.alpha --preset quick

alpha = 1 is plain training; its runs are those of train_pretrain.py.
"""

from .common import distilled, pretrained, run_alone, text_experiment


def experiment(scale):
    def job_of(alpha):
        if alpha == 1.0:
            return lambda seed: pretrained(scale, scale.student, seed)
        return lambda seed: distilled(scale, seed, alpha=alpha)

    arms = [(f"alpha={alpha:g}", job_of(alpha)) for alpha in scale.alphas]
    return text_experiment(scale, "alpha", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
