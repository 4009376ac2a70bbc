"""What a method gains over the plain student: at equal tokens, and at equal cost.

Differences are those to the plain student of the same seed: same first weights, same batches. The
score is the held-out loss in nats per token, or on problems the exact answers at 3 steps in %.
Seeds tell a gain from none where these differences are sure; `differ` in drawing.py asks the same
of two arms whose seeds are not paired.
"""

import numpy as np

from eval.drawing import by_arm

ANSWERS = "accuracy_3"


def score(row: dict) -> float:
    """Higher is better."""
    return 100 * float(row[ANSWERS]) if row.get(ANSWERS) else -float(row["val_loss"])


def curve(rows: list[dict], seed: str) -> tuple[np.ndarray, np.ndarray]:
    """The plain student's budgets of one seed, in flops, and the best score within each."""
    found = [row for row in rows if row["seed"] == seed and row["arm"].split(" x")[0] == "plain"]
    flops, scores = np.array(sorted((float(row["flops"]), score(row)) for row in found)).T
    return flops, np.maximum.accumulate(scores)


def gains(rows: list[dict], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """By how much an arm is better than the plain student, for each seed: at equal tokens, and at
    equal cost: the plain student that has spent as many operations, read off its curve over
    log(flops). Beyond its ends, the end."""
    at_tokens, at_cost = [], []
    for row in (row for row in rows if row["arm"] == arm):
        flops, scores = curve(rows, row["seed"])
        equal = np.interp(np.log(float(row["flops"])), np.log(flops), scores)
        at_tokens.append(score(row) - scores[0])
        at_cost.append(score(row) - equal)
    return np.array(at_tokens), np.array(at_cost)


def beside(rows: list[dict], arm: str, other: str) -> np.ndarray:
    """By how much an arm is better than another one, for each seed that both have."""
    theirs = {row["seed"]: score(row) for row in rows if row["arm"] == other}
    return np.array(
        [score(r) - theirs[r["seed"]] for r in rows if r["arm"] == arm and r["seed"] in theirs]
    )


def is_told_apart(differences: np.ndarray) -> bool:
    """Whether seeds tell a gain from none: it is more than twice their standard deviation."""
    return len(differences) > 1 and abs(differences.mean()) > 2 * differences.std(ddof=1)


def sorted_arms(rows: list[dict]) -> list[str]:
    """Arms by their gain at equal tokens, the best first; without the plain student."""
    arms = [arm for arm in by_arm(rows) if arm.split(" x")[0] != "plain"]
    return sorted(arms, key=lambda arm: -gains(rows, arm)[0].mean())
