"""Muon or AdamW? The reference teacher with each, at equal time.

    python -m eval.experiments.optimizer --preset quick

A Muon step costs 5-15% more than an AdamW step, so AdamW gets 15% more steps (column seconds says
whether that was fair). Each has its own best learning rate of {0.002, 0.004, 0.008, 0.016}, found
with seed 0 of a shorter run.
"""

from .common import experiment_main, pretrained, run_experiments, text_experiment

ADAMW_RATE, MORE_STEPS = 0.008, 1.15


def experiment(scale):
    more = {
        "steps": int(MORE_STEPS * scale.text_steps),
        "optimizer": "adamw",
        "learning_rate": ADAMW_RATE,
    }
    arms = [
        ("muon", lambda seed: pretrained(scale, scale.teacher, seed)),
        ("adamw", lambda seed: pretrained(scale, scale.teacher, seed, **more)),
    ]
    return text_experiment(scale, "optimizer", arms)


def run(scale, results) -> None:
    run_experiments([experiment(scale)], results)


if __name__ == "__main__":
    experiment_main(__doc__, run)
