"""What alpha does: from the teacher alone (0) to the labels alone (1), at T = 1.

    python -m eval.experiments.alpha --preset quick

alpha = 1 is plain training; its runs are those of train_pretrain.py.
"""

from functools import partial

from .common import distilled, plain, run_alone, text_experiment


def experiment(scale):
    arms = [(f"alpha={a:g}", partial(distilled, scale, alpha=a)) for a in scale.alphas if a < 1]
    arms.append(("alpha=1", partial(plain, scale)))
    return text_experiment(scale, "alpha", arms, scale.more_seeds)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
