"""What alpha does: from the teacher alone (0) to the labels alone (1), at T = 1.

    python -m eval.experiments.alpha --preset quick

alpha = 1 is plain training; its runs are those of train_pretrain.py.
"""

from .common import distilled, experiment_main, pretrained, run_experiments, text_experiment


def experiment(scale):
    def job_of(alpha):
        if alpha == 1.0:
            return lambda seed: pretrained(scale, scale.student, seed)
        return lambda seed: distilled(scale, seed, alpha=alpha)

    arms = [(f"alpha={alpha:g}", job_of(alpha)) for alpha in scale.alphas]
    return text_experiment(scale, "alpha", arms)


def run(scale, results) -> None:
    run_experiments([experiment(scale)], results)


if __name__ == "__main__":
    experiment_main(__doc__, run)
