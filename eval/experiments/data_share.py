"""What little text does: plain and distilled students that may read only a share of it.

    python -m eval.experiments.data_share --preset quick

Every run makes the same number of steps, so a small share is read several times over. The teacher
has read all of it. Column best_val_loss has the lowest held-out loss on the way: what early
stopping would have kept.
"""

from functools import partial

from .common import distilled, plain, run_alone, text_experiment


def experiment(scale):
    arms = []
    for share in scale.data_shares:
        arms.append((f"plain {share:g}", partial(plain, scale, share=share)))
        arms.append((f"distilled {share:g}", partial(distilled, scale, share=share)))
    return text_experiment(scale, "data_share", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
