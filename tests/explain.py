"""What a wrong loss says about the code: the mistakes that people make, each with the value that it
gives, worked by hand beside the right one."""

from fractions import Fraction

import pytest


def explain(found: float, expected: float, mistakes: dict[str, float]) -> str:
    """A sentence for whoever broke a loss: how far off it is, and which mistake gives just that."""
    named = [what for what, value in mistakes.items() if found == pytest.approx(value, rel=1e-9)]
    size = f"{found:.6g} instead of {expected:.6g}"
    if expected:
        ratio = Fraction(found / expected).limit_denominator(100)
        if found == pytest.approx(float(ratio) * expected, rel=1e-9):
            size = f"exactly {ratio} of the expected value"
    reason = " or ".join(named) or "no mistake that is known here: work the value out by hand"
    return f"{size}: {reason}"


def check(found, expected: float, mistakes: dict[str, float], rel: float = 1e-12) -> None:
    """Assert that a loss is what was worked out by hand."""
    found = float(found)
    assert found == pytest.approx(expected, rel=rel), explain(found, expected, mistakes)
