"""Muon or AdamW? The plain student with each, at equal time.

    python -m eval.experiments.optimizer --preset quick

A Muon step costs more than an AdamW step, so AdamW gets 15% more steps (column seconds says
whether that was fair). Muon runs at the scripts' default rate, AdamW at its best of 0.002, 0.004,
0.008 and 0.016 (seed 0, 600 steps: 4.16, 4.05, 3.99, 3.99), which needs a long warm-up: at preset
quick 50 steps of it, where Muon has 5 (with 5 AdamW ended at 5.73, with 40 at 4.73).
"""

from .common import plain, run_alone, text_experiment

ADAMW_RATE, ADAMW_WARMUP, MORE_STEPS = 0.016, 50, 1.15


def experiment(scale):
    more = {
        "steps": int(MORE_STEPS * scale.text_steps),
        "optimizer": "adamw",
        "learning_rate": ADAMW_RATE,
        "warmup": ADAMW_WARMUP,
    }
    arms = [
        ("muon", lambda seed: plain(scale, seed)),
        ("adamw", lambda seed: plain(scale, seed, name="adamw", **more)),
    ]
    return text_experiment(scale, "optimizer", arms)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
