"""Promise: an answer is read in the form that is stated, and in no other."""

import random
from fractions import Fraction

import pytest

from dataset.answers import FORMS, check_form, is_answer, read_answer
from dataset.problems import number_of

CASES = [  # form, reply, the number that is its answer
    ("tags", "<think>\n7\n</think>\n<answer>\n42\n</answer>", 42),
    ("tags", "<answer> $1,234.50 </answer>", Fraction("1234.5")),
    ("tags", "#### 42", None),
    ("tags", "The answer is 42.", None),
    ("gsm8k", "He has 48+24 = 72.\n#### 72", 72),
    ("gsm8k", "#### 5\nno, wait.\n#### 72 clips, I think", 72),
    ("gsm8k", "####72", 72),
    ("gsm8k", "#### $1,234.00\nThat is 7 more.", 1234),
    ("gsm8k", "#### -3%", -3),
    ("gsm8k", "#### 1/2", None),
    ("gsm8k", "#### none of the 3\n", 3),
    ("gsm8k", "#### none\n3", None),
    ("gsm8k", "### 72", None),
    ("gsm8k", "72 ####", None),
    ("boxed", r"So $\boxed{42}$ it is, not 7.", 42),
    ("boxed", r"\boxed{5} \boxed{ 1{,}234 }", 1234),
    ("boxed", r"\boxed{\$5.50}", Fraction("5.5")),
    ("boxed", r"\boxed{50\%}", 50),
    ("boxed", r"\boxed{42\text{ km}}", 42),
    ("boxed", r"\boxed{x = -7}", -7),
    ("boxed", "\\boxed{\u22127}", -7),
    ("boxed", r"\boxed{\frac{1}{2}}", None),
    ("boxed", r"\boxed{42", None),
    ("boxed", r"\boxed 42", None),
    ("last", "17 - 3 = 14, so 14.", 14),
    ("last", "It is **42**.", 42),
    ("last", "Answer:42", 42),
    ("last", "1. Add.\n2. The sum is $1,234.50!", Fraction("1234.5")),
    ("last", "at 10:30 or 1/2 or 2^3 or v3.1.4 or the 4th or A4 or 1e5", None),
    ("last", "5 of them at 10:30", 5),
    ("last", "pages 10-12", 12),
    ("last", "minus: -12", -12),
    ("last", "42km", 42),
    ("last", "none", None),
]  # fmt: skip


@pytest.mark.parametrize("form, reply, number", CASES)
def test_the_number_of_a_reply(form, reply, number):
    for wanted in (0, 1, 2, 3, 5, 7, 10, 12, 14, 30, 42, 72, 1234, -7, number):
        if wanted is not None:
            written = str(wanted) if Fraction(wanted).denominator == 1 else str(float(wanted))
            assert is_answer(reply, written, form) == (wanted == number), wanted


@pytest.mark.parametrize(
    "form, reply, text",
    [
        ("tags", "<answer>\n blue sea \n</answer>", "blue sea"),
        ("gsm8k", "it is\n#### blue sea \nred", "blue sea"),
        ("boxed", r"\boxed{\text{blue sea}}", "blue sea"),
        ("boxed", r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
    ],
)
def test_the_words_of_a_reply(form, reply, text):
    assert is_answer(reply, text, form) and is_answer(reply, f" {text} ", form)
    assert not is_answer(reply, "red", form) and not is_answer(reply, "blue", form)
    for other in FORMS:
        if other != form:
            assert not is_answer(reply, text, other)


WRITTEN = {
    "tags": "<answer>\n{}\n</answer>", "gsm8k": "\n#### {}", "boxed": "\\boxed{{{}}}", "last": " {}"
}  # fmt: skip
PIECES = ["####", "\\boxed{", "}", "<answer>", "</answer>", "7", "1,000", "-", ".", ",", "/", "$"]
PIECES += ["\n", " ", "%", ":", "^", "x", "\u2212", "\\text{", "{,}", "é", "9" * 60, "", "\x00"]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_whatever_stands_before(form):
    """A number in its form, behind rubbish, is the answer, and no other number is."""
    rng = random.Random(form)
    for _ in range(1500):
        number = rng.choice([rng.randrange(-999, 10**6), rng.randrange(10**4) / 8])
        shown = rng.choice([str(number), f"{number:,}", f"{number}%", f"{number} "])
        rubbish = "".join(rng.choices(PIECES, k=rng.randrange(8)))
        if form == "tags":  # the first is read
            rubbish = rubbish.replace("<", "(")
        reply = rubbish + " " + WRITTEN[form].format(shown)
        assert is_answer(reply, str(number), form), reply
        assert not is_answer(reply, str(number + 1), form), reply
        assert not is_answer(rubbish, "424242", form)


@pytest.mark.parametrize("form", FORMS)
def test_no_reply_is_too_odd_to_read(form):
    rng = random.Random(form)
    for _ in range(3000):
        reply = "".join(rng.choices(PIECES, k=rng.randrange(12)))
        found = read_answer(reply, form)
        assert found is None or found.replace("\u2212", "-") in reply.replace("\u2212", "-")
        for answer in (7, 1000, "x", ""):
            right = is_answer(reply, answer, form)
            assert not right or found is not None
    for long in ("9" * 10**5, "-" * 10**5, "1," * 10**5, "{" * 10**5, "\\text{" * 10**4):
        assert not is_answer(f"\\boxed{{{long}", "7", form)


def test_a_text_has_no_last_number():
    problems = [{"answer": "42"}, {"answer": "blue"}]
    for form in ("tags", "gsm8k", "boxed"):
        check_form(problems, form)
    check_form(problems[:1], "last")
    with pytest.raises(ValueError, match="'blue' is no number.*--answer_form last.*boxed"):
        check_form(problems, "last")
    with pytest.raises(ValueError, match="--answer_form first is none of tags, gsm8k"):
        read_answer("42", "first")
    assert number_of("blue") is None
