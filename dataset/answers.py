"""Where a reply's answer stands, in each of the forms that models give it.

    tags     <answer>42</answer>, as the lessons' models are trained
    gsm8k    "#### 42": the first number behind the last ####, on its line
    boxed    \\boxed{42}: what the last one holds, as models of mathematics write
    last     the last number of the reply: for models that keep to no form

The form is stated, never guessed: a reply that names the right number somewhere is not an answer.
Numbers are compared as numbers ("1,234" is 1234, "$5.00" is 5), other answers as texts. A number
that is a part of something else is none: 1/2, 10:30, 2^3, 3.1.4, 4th, A4.
"""

import re
from fractions import Fraction

from .problems import ANSWER, ANSWER_TEXT, NUMBER, number_of

FORMS = ("tags", "gsm8k", "boxed", "last")
BEFORE = r"(?<![^\W_])(?<!\d[.,:])(?<![/^])"  # no letter or digit, nor what joins two numbers
BEHIND = r"(?![/^]|[.,:]\d|[^\W\d_]*\d|(?:st|nd|rd|th)\b)"
ALONE = re.compile(f"{BEFORE}({NUMBER}){BEHIND}")
MINUS = str.maketrans("\u2212\u2013", "--")  # as typeset
BOXED = "\\boxed{"
TEXT = re.compile(r"\\text\{([^{}]*)\}")
LATEX = re.compile(r"\\[,!;: ]|[{}$]|\\(?=[%$])|^\s*[a-zA-Z]\s*=")


def read_answer(response: str, form: str = "tags") -> str | None:
    """The answer's words in a reply; None where there is none in that form."""
    if form == "tags":
        found = ANSWER_TEXT.search(response)
        return found[1] if found else None
    if form == "gsm8k":
        _, mark, rest = response.rpartition("####")
        return rest.strip().split("\n")[0].strip() if mark and rest.strip() else None
    if form == "boxed":
        _, mark, rest = response.rpartition(BOXED)
        depth = 1
        for place, character in enumerate(rest if mark else ""):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[:place].strip()
        return None
    if form == "last":
        found = ALONE.findall(response.translate(MINUS))
        return found[-1] if found else None
    raise ValueError(f"--answer_form {form} is none of {', '.join(FORMS)}")


def number_in(words: str, form: str) -> Fraction | None:
    """The number that the answer's words are; None where they are none."""
    words = words.translate(MINUS)
    if form == "gsm8k":
        found = ALONE.search(words)
        words = found[1] if found else ""
    if form == "boxed":
        words = LATEX.sub("", TEXT.sub("", words).replace("{,}", ","))
    return number_of(words)


def is_answer(response: str, answer, form: str = "tags") -> bool:
    """Whether the reply's answer is `answer`: as a number if that is one, else as a text."""
    wanted, words = number_of(answer), read_answer(response, form)
    if words is None:
        return False
    if wanted is None:
        return TEXT.sub(r"\1", words) == str(answer).strip()
    if form == "tags":  # the first that is a number
        found = ANSWER.search(response)
        return found is not None and number_of(found[1]) == wanted
    return number_in(words, form) == wanted


def check_form(problems: list[dict], form: str) -> None:
    """Raise ValueError where `form` reads numbers alone, and an answer is none."""
    for problem in problems if form == "last" else []:
        if number_of(problem["answer"]) is None:
            text = f"the answer {problem['answer']!r:.60} is no number, and --answer_form last"
            raise ValueError(f"{text} reads numbers alone: use tags, gsm8k or boxed")
