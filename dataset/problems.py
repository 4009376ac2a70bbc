"""Grade-school word problems with traces that a program can check line by line.

    Compared with Ben, Cal has 3 times as many pens. Now Ann has 12 pens. There are 7 caps in a
    box. Compared with Ann, Ben has 5 more pens. How many pens does Cal have?

train_distill_reason.py shows the trace and the answer. A problem of n steps is a chain: each
quantity is computed from the one before (more, fewer, times, shared equally) or from that and an
earlier one (a total). Distractors are added (other things, other people). Tier easy has small
numbers and tells the facts in the order in which they are needed; tier hard (above) shuffles them.

A line of the trace quotes a fact, then computes. The next fact is found by looking for the last
name and copying what follows it, which two layers learn within a few hundred steps. With facts the
other way round ("Ben has 5 more pens than Ann"), or bare equations, models of up to 1M parameters
did not learn in 50,000 examples which number belongs to whom. Every name has a space before it, as
a byte-level tokenizer sees no kinship between " Ann" and "Ann". The hash of its equations gives a
problem's split: no test problem is in training under other names or in another order.
"""

import hashlib
import operator
import random
import re
from dataclasses import dataclass
from fractions import Fraction

NAMES = "Ann Ben Cal Dan Eve Fay Gus Hal Ida Jim Kim Lee Max Ned Pam Ray Sam Tom Una Val Wes Zoe"
NAMES = NAMES.split()
OBJECTS = "pens caps eggs figs nuts cups keys maps bells coins cards books".split()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
GIVEN = re.compile(r"\w+=([0-9]{1,40})")
EQUATION = re.compile(r"\w+=([0-9]{1,40})([-+*/])([0-9]{1,40})=([0-9]{1,40})")
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]{1,40})(?:\.[0-9]{0,40})?|\.[0-9]{1,40}"
NUMBER = rf"(?:-?\$?|\$-)(?:{DIGITS})%?"  # 1234, 1,234, -3.5, $10, 50%
RESPONSE = re.compile(rf"<think>\n(.*?)\n</think>\n<answer>\n({NUMBER})\n</answer>", re.DOTALL)
ANSWER = re.compile(rf"<answer>\s*({NUMBER})\s*</answer>")
ANSWER_TEXT = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


@dataclass(frozen=True)
class Tier:
    """How hard problems are: largest result, largest number added, largest factor, and whether the
    facts are shuffled."""

    largest: int
    added: int
    factor: int
    shuffled: bool


TIERS = {"easy": Tier(50, 9, 3, shuffled=False), "hard": Tier(99, 20, 5, shuffled=True)}


@dataclass(frozen=True)
class Problem:
    """A question, the lines that solve it (what is given, then one a step), and the answer."""

    question: str
    lines: tuple[str, ...]
    answer: int

    @property
    def steps(self) -> int:
        return len(self.lines) - 1

    @property
    def split(self) -> str:
        """ "test" (10%), "prompts" (30%: no gold trace is written) or "train", by content."""
        equations = " ".join(line.split("=", 1)[1] for line in self.lines[1:])  # "12+5=17 ..."
        digest = hashlib.sha256(equations.encode("utf-8")).digest()
        bucket = int.from_bytes(digest[:2], "big")
        return "test" if bucket < 6554 else "prompts" if bucket < 26214 else "train"

    def response(self) -> str:
        """The gold assistant turn."""
        return "\n".join(["<think>", *self.lines, f"</think>\n<answer>\n{self.answer}\n</answer>"])


def make_problem(rng: random.Random, steps: int, tier: str = "easy") -> Problem:
    """A random problem of `steps` dependent steps, with numbers from 1 to the tier's largest."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: a problem has at least one")
    while (problem := try_problem(rng, steps, TIERS[tier])) is None:
        pass
    return problem


def try_problem(rng: random.Random, steps: int, tier: Tier) -> Problem | None:
    """One attempt; None where a number left the range."""
    people, earlier = rng.sample(NAMES, steps + 3), 0
    thing, other_thing = rng.sample(OBJECTS, 2)
    values = [rng.randint(2, 30)]
    stated = f" {people[0]} has {values[0]} {thing}"  # what the question says and a line quotes
    facts, lines = [f"Now{stated}."], [f"{stated}: {people[0]}={values[0]}"]
    for step in range(1, steps + 1):
        name, before, value = people[step], people[step - 1], values[-1]
        kind = rng.choice(["more", "fewer", "times", "share"] + ["total"] * (step > 1))
        number = rng.randint(2, tier.added if kind in ("more", "fewer") else tier.factor)
        if kind == "share" and value % number:
            return None
        if kind == "total":
            earlier = rng.randrange(step - 1)
            number = values[earlier]
        sign, stated = {
            "more": ("+", f"{number} more {thing}"),
            "fewer": ("-", f"{number} fewer {thing}"),
            "times": ("*", f"{number} times as many {thing}"),
            "share": ("/", f"one of {number} equal shares of the {thing}"),
            "total": ("+", f"as many {thing} and those of {people[earlier]} in total"),
        }[kind]
        result, equation = OPERATIONS[sign](value, number), f"{value}{sign}{number}"
        if not 1 <= result <= tier.largest:
            return None
        stated = f" {before}, {name} has {stated}"
        values.append(result)
        facts.append(f"Compared with{stated}.")
        lines.append(f"{stated}: {name}={equation}={result}")
    asked = f"How many {thing} does {people[steps]} have?"
    if rng.random() < 0.5:  # distractors
        facts.append(f"There are {rng.randint(2, 30)} {other_thing} in a box.")
        if rng.random() < 0.5:
            owner, other_owner = people[steps + 1 :]
            number = rng.randint(2, tier.added)
            facts.append(f"Compared with {owner}, {other_owner} has {number} more {other_thing}.")
    if tier.shuffled:
        rng.shuffle(facts)
    return Problem(" ".join([*facts, asked]), tuple(lines), values[-1])


def make_problems(
    split: str, steps: tuple[int, ...], count: int, seed: int, tier: str = "easy"
) -> list[Problem]:
    """`count` different problems of one split, with equal shares of each number of steps. Raises
    ValueError where the split has not so many different questions."""
    rng = random.Random(f"{split} {steps} {seed}")
    found: dict[str, Problem] = {}
    for _ in range(1000 * count + 10000):
        if len(found) == count:
            return list(found.values())
        problem = make_problem(rng, steps[len(found) % len(steps)], tier)
        if problem.split == split:
            found.setdefault(problem.question, problem)
    raise ValueError(f"cannot make {count} different {split} problems: ask for fewer")


def number_of(value) -> Fraction | None:
    """The number that a JSON value is, or a text in a form of NUMBER; None where it is none. A
    dollar or percent sign is a unit: "50%" is 50."""
    if isinstance(value, str):
        value = value.strip()
        return Fraction(re.sub("[$,%]", "", value)) if re.fullmatch(NUMBER, value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
        return None  # what less itself is not 0 is infinite or nan
    return Fraction(str(value))


def answer_of(text: str) -> int | str:
    """What stands as "answer" in a jsonl: a whole number as one, anything else as written."""
    number = number_of(text)
    return text if number is None or number.denominator > 1 else int(number)


def check_problem(value: dict, turns: list[dict], where: str) -> None:
    """Raise ValueError where no reply to `turns` can be checked by `value`, a line of a jsonl."""
    answer, steps = value.get("answer"), value.get("steps", 0)
    is_text = isinstance(answer, str) and answer.strip()
    asks = any(turn["role"] == "user" for turn in turns)
    if not asks or not (is_text or number_of(answer) is not None):
        raise ValueError(f'{where} needs a user turn and an "answer", a number or a text')
    if type(steps) is not int or steps < 0:
        raise ValueError(f'{where}: "steps" {steps!r} must be a whole number, 0 or more')


@dataclass(frozen=True)
class TraceCheck:
    """What is right about a response: its form, its lines, its answer."""

    well_formed: bool  # exactly one <think> and one <answer> span, in that order, nothing else
    verified: bool  # well formed, every line true and on known numbers, the last the answer
    answer: Fraction | None  # the first number in an <answer> span, in whatever form the rest is


def check_response(question: str, response: str) -> TraceCheck:
    """Check a response without knowing the gold trace."""
    found, match = ANSWER.search(response), RESPONSE.fullmatch(response.strip())
    answer = number_of(found[1]) if found else None
    if match is None or any(tag in match[1] for tag in ("<think>", "<answer>", "</")):
        return TraceCheck(False, False, answer)
    return TraceCheck(True, proves(match[1], question, answer), answer)


def proves(lines: str, question: str, answer: Fraction | None) -> bool:
    """Whether every line is true, one computes, and the last ends in the answer. A line quotes the
    question (or nothing), then has a colon and "name=a" with a number of the question, or
    "name=a op b=c" with c right, and a and b in the question or computed above."""
    asked = {int(number) for number in re.findall(r"[0-9]{1,40}", question)}
    computed, result = set(), None
    for line in lines.split("\n"):
        quote, _, claim = line.rpartition(":")
        given, equation = GIVEN.fullmatch(claim.strip()), EQUATION.fullmatch(claim.strip())
        if quote.strip() not in question:
            return False
        if given is not None and int(given[1]) in asked:
            result = int(given[1])
            continue
        if equation is None:
            return False
        sign, left, right, result = equation[2], *(int(equation[i]) for i in (1, 3, 4))
        is_whole = sign != "/" or (right > 0 and left % right == 0)  # no rounded division
        if not is_whole or not {left, right} <= asked | computed:
            return False
        if OPERATIONS[sign](left, right) != result:
            return False
        computed.add(result)
    return bool(computed) and result == answer
