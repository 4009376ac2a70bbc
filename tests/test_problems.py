"""Promise: every generated problem says what its trace computes, and no wrong trace verifies.

The questions are read here by a second program that knows only their English, not the generator.
"""

import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from dataset import problems as problems_module
from dataset.problems import NAMES, Problem, check_response, make_problem, make_problems

NAME, THING, N = "([A-Z][a-z]+)", "([a-z]+)", r"(\d+)"
BESIDE = f"Compared with {NAME}, {NAME} has "  # the one compared with comes first
SENTENCES = {
    "has": f"Now {NAME} has {N} {THING}",
    "box": f"There are {N} {THING} in a box",
    "more": f"{BESIDE}{N} more {THING}",
    "fewer": f"{BESIDE}{N} fewer {THING}",
    "times": f"{BESIDE}{N} times as many {THING}",
    "share": f"{BESIDE}one of {N} equal shares of the {THING}",
    "total": f"{BESIDE}as many {THING} and those of {NAME} in total",
}


def read_question(question: str):
    """The facts {(person, thing): (kind, ...)} in reading order, and (person, thing) asked for."""
    *sentences, last = re.split(r"(?<=[.?]) ", question)
    asked = re.fullmatch(f"How many {THING} does {NAME} have\\?", last)
    facts = {}
    for sentence in sentences:
        found = [(k, re.fullmatch(p + r"\.", sentence)) for k, p in SENTENCES.items()]
        ((kind, m),) = [(k, m) for k, m in found if m]
        if kind == "has":
            owner, thing, fact = m[1], m[3], (kind, int(m[2]))
        elif kind == "box":
            owner, thing, fact = "a box", m[2], (kind, int(m[1]))
        elif kind == "total":
            owner, thing, fact = m[2], m[3], (kind, m[1], m[4])
        else:
            owner, thing, fact = m[2], m[4], (kind, int(m[3]), m[1])
        assert (owner, thing) not in facts, "two facts about one quantity"
        facts[owner, thing] = fact
    return facts, (asked[2], asked[1])


def solve(question: str):
    """The answer, and every quantity {person: value} that it needs."""
    facts, (asked, thing) = read_question(question)
    values = {}

    def value(person: str) -> int:
        if person not in values:
            kind, *rest = facts[person, thing]
            if kind == "has":
                result = rest[0]
            elif kind == "total":
                result = value(rest[0]) + value(rest[1])
            elif kind == "share":
                result, remainder = divmod(value(rest[1]), rest[0])
                assert remainder == 0
            else:
                other = value(rest[1])
                result = {"more": other + rest[0], "fewer": other - rest[0]}.get(
                    kind, other * rest[0]
                )
            values[person] = result
        return values[person]

    return value(asked), values


def test_the_second_reader_solves_the_example_of_the_file():
    question = (
        "Compared with Ben, Cal has 3 times as many pens. Now Ann has 12 pens. There are 7 caps in "
        "a box. Compared with Ann, Ben has 5 more pens. How many pens does Cal have?"
    )
    assert solve(question) == (51, {"Ann": 12, "Ben": 17, "Cal": 51})


@pytest.fixture(scope="module", params=["easy", "hard"])
def tier(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(tier) -> list[Problem]:
    """Of each tier, as many of 1 step as of 2, 3, 4 and 5."""
    rng = random.Random(0)
    return [make_problem(rng, 1 + i % 5, tier) for i in range(3000)]


def test_question_solved_by_a_second_reader_gives_the_answer(made):
    for problem in made:
        answer, values = solve(problem.question)
        assert problem.answer == answer
        # The trace has every person on the way with the right value, and nobody else.
        assert values == {
            line.split(": ")[1].split("=")[0]: int(line.split("=")[-1]) for line in problem.lines
        }


def test_a_trace_is_what_is_given_and_a_line_for_each_step(made):
    for i, problem in enumerate(made):
        given, *steps = problem.lines
        assert len(steps) == problem.steps == 1 + i % 5
        assert re.fullmatch(r" ([A-Z][a-z]+) has (\d+) [a-z]+: \1=\2", given)
        assert all(re.fullmatch(r"[^:]+: [A-Z][a-z]+=\d+[-+*/]\d+=\d+", line) for line in steps)
        assert all(line.split(":")[0] in problem.question for line in problem.lines)


def test_gold_trace_verifies(made):
    for problem in made:
        check = check_response(problem.question, problem.response())
        assert (check.well_formed, check.verified, check.answer) == (True, True, problem.answer)


def test_every_number_is_1_to_the_largest_of_the_tier(made, tier):
    largest = {"easy": 50, "hard": 99}[tier]
    for problem in made:
        numbers = re.findall(r"-?\d+", problem.question)
        numbers += re.findall(r"\d+", " ".join(problem.lines))
        assert all(1 <= int(number) <= largest for number in numbers)
        assert not re.search(r"=-|\+-|\.\d", " ".join(problem.lines))


def test_every_relation_and_both_distractors_occur(made):
    kinds, distractors, without = Counter(), Counter(), 0
    for problem in made:
        facts, (_, thing) = read_question(problem.question)
        _, values = solve(problem.question)
        needed = {(person, thing) for person in values}
        kinds.update(facts[key][0] for key in needed)
        extra = [key for key in facts if key not in needed]
        assert all(what != thing for _, what in extra)
        distractors.update(facts[key][0] for key in extra)
        without += not extra
        assert len(facts) == problem.steps + 1 + len(extra)
    assert kinds["has"] == 3000
    for kind in ("more", "fewer", "times", "share", "total"):
        assert kinds[kind] > 200, kind
    assert distractors["box"] > 500 and distractors["more"] > 500
    assert without > 500


def test_facts_are_in_order_where_easy_and_shuffled_where_hard(made, tier):
    # Shuffled, the given value of 4 or more facts comes first in at most 1 of 4 problems, and the
    # chain stands in order in at most 1 of 4!.
    long = [p for p in made if p.steps >= 3]
    first = in_order = 0
    for problem in long:
        facts, (_, thing) = read_question(problem.question)
        _, values = solve(problem.question)
        owners = [who for who, what in facts if what == thing and who in values]
        chain = [line.split(": ")[1].split("=")[0] for line in problem.lines[1:]]
        first += owners[0] not in chain
        in_order += [o for o in owners if o in chain] == chain
    if tier == "easy":
        assert first == in_order == len(long)
    else:
        assert 0.1 < first / len(long) < 0.35
        assert in_order / len(long) < 0.2  # 1/3! at 3 steps, less at more


def test_names_and_things_vary(made):
    owners = Counter(who for p in made for who, _ in read_question(p.question)[0])
    things = Counter(read_question(p.question)[1][1] for p in made)
    assert set(owners) == {*NAMES, "a box"} and len(things) == 12


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="steps = 0"):
        make_problem(random.Random(0), 0)


# --- Splits ---


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Problem]]:
    """Problems of the three splits, drawn with several seeds."""
    steps = {"train": (1, 2, 3, 4), "prompts": (1, 2, 3, 4), "test": (1, 2, 3, 4, 5)}
    return {
        split: [p for seed in range(3) for p in make_problems(split, numbers, 200, seed)]
        for split, numbers in steps.items()
    }


def equations(problem: Problem) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+[-+*/]\d+=\d+", " ".join(problem.lines)))


@pytest.mark.parametrize(
    "one, other", [("train", "test"), ("train", "prompts"), ("prompts", "test")]
)
def test_splits_share_no_equations_whatever_the_seed(splits, one, other):
    first, second = ({equations(p) for p in splits[split]} for split in (one, other))
    assert not first & second
    assert len(first) > 100 and len(second) > 100


def test_names_and_order_do_not_make_a_test_problem_a_training_problem(splits):
    for problem in splits["test"][:50]:
        lines = ("Zoe=1", *(f"Zoe={equation}" for equation in equations(problem)))
        renamed = Problem("Zoe has 1 cup. How many?", lines, problem.answer)
        assert renamed.split == "test"


def test_shares_of_the_splits(made):
    counts = Counter(problem.split for problem in made if problem.steps > 2)
    total = sum(counts.values())
    assert counts["test"] / total == pytest.approx(0.1, abs=0.03)
    assert counts["prompts"] / total == pytest.approx(0.3, abs=0.04)
    assert counts["train"] / total == pytest.approx(0.6, abs=0.05)


def test_steps_have_equal_shares_and_five_only_where_asked(splits):
    assert Counter(p.steps for p in splits["train"]) == dict.fromkeys((1, 2, 3, 4), 150)
    assert Counter(p.steps for p in splits["test"]) == dict.fromkeys((1, 2, 3, 4, 5), 120)


def test_no_question_twice_and_the_same_problems_again():
    first = make_problems("train", (1, 2), 300, seed=7)
    assert len({p.question for p in first}) == 300
    assert make_problems("train", (1, 2), 300, seed=7) == first
    assert make_problems("train", (1, 2), 300, seed=8) != first
    assert make_problems("train", (1, 2), 100, seed=7) == first[:100]


def test_more_problems_than_there_are_is_refused(monkeypatch):
    same = Problem("Ann has 1 pen. How many?", ("Ann=1", "Ben=1+1=2"), 2)
    monkeypatch.setattr(problems_module, "make_problem", lambda rng, steps, tier: same)
    with pytest.raises(ValueError, match=f"cannot make 2 different {same.split} problems"):
        make_problems(same.split, (1,), 2, seed=0)


# --- The checker ---

QUESTION = (
    "Now Ann has 12 pens. Dan has 7 caps. Ben has 5 more pens than Ann. Cal has 3 times as many."
)


def response(think: str, answer) -> str:
    return f"<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


GOLD = response("Ann=12\nBen=12+5=17\nCal=17*3=51", 51)
HUGE = "9" * 5000  # more digits than int() takes

CASES = {  # name: (response, well formed, verified, answer)
    "gold": (GOLD, True, True, 51),
    "space around": (f"\n {GOLD}\n", True, True, 51),
    "given not repeated": (response("Ben=12+5=17\nCal=17*3=51", 51), True, True, 51),
    "names left out": (response("12+5=17\n17*3=51", 51), True, False, 51),
    "given from nowhere": (response("Ann=13\nBen=12+5=17", 17), True, False, 17),
    "given without a number": (response("Ann=\nBen=12+5=17", 17), True, False, 17),
    "a detour that is true": (response("Dan=12-7=5\nBen=12+5=17", 17), True, True, 17),
    "division": (response("Ben=12/3=4", 4), True, True, 4),
    "wrong sum": (response("Ben=12+5=18\nCal=18*3=54", 54), True, False, 54),
    "wrong product": (response("Ben=12+5=17\nCal=17*3=52", 52), True, False, 52),
    "wrong difference": (response("Ben=12-5=8", 8), True, False, 8),
    "inexact division": (response("Ben=12/5=2", 2), True, False, 2),
    "division by zero": (response("Ben=12-12=0\nCal=12/0=0", 0), True, False, 0),
    "zero by zero": (response("Ben=12-12=0\nCal=0/0=0", 0), True, False, 0),
    "number from nowhere": (response("Ben=12+6=18", 18), True, False, 18),
    "number from a line below": (response("Cal=17*3=51\nBen=12+5=17", 17), True, False, 17),
    "answer is not the last line's": (response("Ben=12+5=17\nCal=17*3=51", 17), True, False, 17),
    "answer without a trace": (response("Cal has a lot.", 51), True, False, 51),
    "words beside the equation": (response("Ben=12+5=17 pens", 17), True, False, 17),
    "empty line": (response("Ben=12+5=17\n\nCal=17*3=51", 51), True, False, 51),
    "two equations in a line": (response("Ben=12+5=17, Cal=17*3=51", 51), True, False, 51),
    "unknown operator": (response("Ben=12^5=17", 17), True, False, 17),
    "negative result": (response("Ben=5-12=-7", -7), True, False, -7),
    "chain of equals": (response("Ben=12+5=17=17", 17), True, False, 17),
    "empty think": (response("", 51), True, False, 51),
    "no think": ("<answer>\n51\n</answer>", False, False, 51),
    "no answer": ("<think>\nBen=12+5=17\n</think>", False, False, None),
    "think not closed": (GOLD.replace("</think>", ""), False, False, 51),
    "answer not closed": (GOLD.replace("</answer>", ""), False, False, None),
    "answer not opened": (GOLD.replace("<answer>", ""), False, False, None),
    "answer first": ("<answer>\n17\n</answer>\n<think>\nBen=12+5=17\n</think>", False, False, 17),
    "two answers": (f"{GOLD}\n<answer>\n52\n</answer>", False, False, 51),
    "two thoughts": ("<think>\n12+5=17\n</think>\n" + GOLD, False, False, 51),
    "think inside think": (response("<think>\nBen=12+5=17", 17), False, False, 17),
    "answer inside think": (response("<answer>\n51\n</answer>", 52), False, False, 51),
    "text before": ("Sure! " + GOLD, False, False, 51),
    "text after": (GOLD + " I hope so.", False, False, 51),
    "text between": (GOLD.replace("\n<answer>", " so\n<answer>"), False, False, 51),
    "answer in words": (response("Ben=12+5=17", "seventeen"), False, False, None),
    "answer with a unit": (response("Ben=12+5=17", "17 pens"), False, False, None),
    "decimal": (response("Ben=12+5=17", "17.5"), True, False, Fraction(35, 2)),
    "thousands": (response("Ben=12+5=17", "1,017"), True, False, 1017),
    "dollars": (response("Ben=12+5=17", "$17"), True, True, 17),
    "percent": (response("Ben=12+5=17", "17%"), True, True, 17),
    "commas that part no thousands": (response("Ben=12+5=17", "1,7"), False, False, None),
    "a fraction": (response("Ben=12+5=17", "34/2"), False, False, None),
    "empty": ("", False, False, None),
    "blank": (" \n", False, False, None),
    "end of turn written out": (GOLD + "<|im_end|>", False, False, 51),
    "huge numbers": (
        response(f"Ben={10**30}+5={10**30 + 5}", 10**30 + 5), True, False, 10**30 + 5
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_check_response(name):
    text, well_formed, verified, answer = CASES[name]
    check = check_response(QUESTION, text)
    assert (check.well_formed, check.verified, check.answer) == (well_formed, verified, answer)


@pytest.mark.parametrize(
    "text",
    [
        response("Ben=12+5=17", HUGE),
        response(f"Ben=12+5={HUGE}", 17),
        response(f"Ben={HUGE}+5=17", 17),
        response(f"Ann={HUGE}", 17),
        f"<answer>{HUGE}</answer>",
    ],
    ids=["answer", "result", "operand", "given", "no form"],
)
def test_a_student_that_repeats_a_digit_does_not_stop_the_evaluation(text):
    assert check_response(QUESTION, text).verified is False


def test_any_one_changed_digit_is_noticed(made):
    rng = random.Random(1)
    caught = 0
    for problem in made[:300]:
        text = problem.response()
        steps = text.index("\n", len("<think>\n"))  # behind the line of what is given
        place = rng.choice([i for i, c in enumerate(text) if c.isdigit() and i > steps])
        changed = (
            text[:place] + str((int(text[place]) + rng.randint(1, 9)) % 10) + text[place + 1 :]
        )
        caught += not check_response(problem.question, changed).verified
    assert caught == 300
