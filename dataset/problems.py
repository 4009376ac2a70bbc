"""Grade-school word problems with traces that a program can check line by line.

    Now Ann has 12 pens. Dan has 7 caps. Ben has 5 more pens than Ann. Cal has 3 times as many pens
    as Ben. How many pens does Cal have?

    <think>
     Ann=12
     Ben=12+5=17
     Cal=17*3=51
    </think>
    <answer>
    51
    </answer>

A problem of n steps is a chain: each quantity is computed from the one before (more, fewer, times,
shared equally) or from that and an earlier one (a total). Facts about other things are mixed in,
and all facts stand in shuffled order.

Every name has a space before it, in the question ("Now" sees to the first) and in the trace: to a
byte-level tokenizer " Ann" and "Ann" are two unrelated tokens, and a small model that has to learn
22 such pairs has that much more to learn before it can look anything up.

Training and test never share a problem: a problem's split follows from the hash of its equations,
so neither other names nor another order of the facts makes a test problem a new one.
"""

import hashlib
import random
import re
from dataclasses import dataclass

NAMES = (
    "Ann Ben Cal Dan Eve Fay Gus Hal Ida Jim Kim Lee Max Ned Pam Ray Sam Tom Una Val Wes Zoe"
).split()
OBJECTS = "pens caps eggs figs nuts cups keys maps bells coins cards books".split()
LARGEST = 99
GIVEN = re.compile(r" ?\w+=([0-9]{1,40})")
EQUATION = re.compile(r" ?\w+=([0-9]{1,40})([-+*/])([0-9]{1,40})=([0-9]{1,40})")
RESPONSE = re.compile(r"<think>\n(.*?)\n</think>\n<answer>\n(-?[0-9]{1,40})\n</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>\s*(-?[0-9]{1,40})\s*</answer>")


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
    def equations(self) -> tuple[str, ...]:
        """The computed lines without the names in front."""
        return tuple(line.split("=", 1)[1] for line in self.lines[1:])

    @property
    def split(self) -> str:
        """ "test" (10%), "prompts" (30%: no gold trace is written) or "train", by content."""
        digest = hashlib.sha256(" ".join(self.equations).encode("utf-8")).digest()
        place = digest[0] * 256 + digest[1]
        return "test" if place < 6554 else "prompts" if place < 26214 else "train"

    def response(self) -> str:
        """The gold assistant turn."""
        think = "\n".join(self.lines)
        return f"<think>\n{think}\n</think>\n<answer>\n{self.answer}\n</answer>"


def make_problem(rng: random.Random, steps: int) -> Problem:
    """A random problem of `steps` dependent steps, all of whose numbers are 1 to 99."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: a problem has at least one")
    while True:
        problem = try_problem(rng, steps)
        if problem is not None:
            return problem


def try_problem(rng: random.Random, steps: int) -> Problem | None:
    """One attempt; None where a number left the range."""
    people = rng.sample(NAMES, steps + 3)
    thing, other_thing = rng.sample(OBJECTS, 2)
    values = [rng.randint(2, 30)]
    facts = [f"{people[0]} has {values[0]} {thing}."]
    lines = [f" {people[0]}={values[0]}"]
    for step in range(1, steps + 1):
        name, before, value = people[step], people[step - 1], values[-1]
        kinds = ["more", "fewer", "times", "share"] + ["total"] * (step > 1)
        kind = rng.choice(kinds)
        number = rng.randint(2, 20) if kind in ("more", "fewer") else rng.randint(2, 5)
        if kind == "more":
            result, equation = value + number, f"{value}+{number}"
            facts.append(f"{name} has {number} more {thing} than {before}.")
        elif kind == "fewer":
            result, equation = value - number, f"{value}-{number}"
            facts.append(f"{name} has {number} fewer {thing} than {before}.")
        elif kind == "times":
            result, equation = value * number, f"{value}*{number}"
            facts.append(f"{name} has {number} times as many {thing} as {before}.")
        elif kind == "share":
            if value % number:
                return None
            result, equation = value // number, f"{value}/{number}"
            facts.append(f"{name} has one of {number} equal shares of the {thing} of {before}.")
        else:
            earlier = rng.randrange(step - 1)
            result, equation = value + values[earlier], f"{value}+{values[earlier]}"
            facts.append(f"{name} has as many {thing} as {before} and {people[earlier]} in total.")
        if not 1 <= result <= LARGEST:
            return None
        values.append(result)
        lines.append(f" {name}={equation}={result}")
    asked = f"How many {thing} does {people[steps]} have?"
    # Distractors: what two more people have of other things.
    owner, other_owner = people[steps + 1 : steps + 3]
    if rng.random() < 0.5:
        facts.append(f"{owner} has {rng.randint(2, 30)} {other_thing}.")
        if rng.random() < 0.5:
            number = rng.randint(2, 20)
            facts.append(f"{other_owner} has {number} more {other_thing} than {owner}.")
    rng.shuffle(facts)
    return Problem(" ".join(["Now", *facts, asked]), tuple(lines), values[-1])


def make_problems(split: str, steps: tuple[int, ...], count: int, seed: int) -> list[Problem]:
    """`count` different problems of one split, with equal shares of each number of steps.

    Raises ValueError where the split has not so many different questions.
    """
    rng = random.Random(f"{split} {steps} {seed}")
    problems, seen, tries = [], set(), 0
    while len(problems) < count:
        tries += 1
        if tries > 1000 * count + 10000:
            raise ValueError(f"cannot make {count} different {split} problems: ask for fewer")
        problem = make_problem(rng, steps[len(problems) % len(steps)])
        if problem.split == split and problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


@dataclass(frozen=True)
class TraceCheck:
    """What is right about a response: its form, its lines, its answer."""

    well_formed: bool  # exactly one <think> and one <answer> span, in that order, nothing else
    verified: bool  # well formed, every line true and on known numbers, the last the answer
    answer: int | None  # the integer in the first <answer> span, in whatever form the rest is


def check_response(question: str, response: str) -> TraceCheck:
    """Check a response without knowing the gold trace.

    A line verifies if it is "name=a" with a number of the question, or "name=a op b=c" with c right
    and with a and b from the question or computed by a line above.
    """
    answer_match = ANSWER.search(response)
    answer = int(answer_match.group(1)) if answer_match else None
    match = RESPONSE.fullmatch(response.strip())
    if match is None or any(tag in match.group(1) for tag in ("<think>", "<answer>", "</")):
        return TraceCheck(False, False, answer)
    asked = {int(number) for number in re.findall(r"[0-9]{1,40}", question)}
    known, result, computed = set(asked), None, False
    for line in match.group(1).split("\n"):
        given, equation = GIVEN.fullmatch(line), EQUATION.fullmatch(line)
        if given is not None and int(given[1]) in asked:
            result = int(given[1])
            continue
        if equation is None:
            return TraceCheck(True, False, answer)
        left, operator, right = int(equation[1]), equation[2], int(equation[3])
        result = int(equation[4])
        if left not in known or right not in known or not holds(left, operator, right, result):
            return TraceCheck(True, False, answer)
        known.add(result)
        computed = True
    return TraceCheck(True, computed and result == answer, answer)


def holds(left: int, operator: str, right: int, result: int) -> bool:
    """Whether left operator right = result, in whole numbers."""
    if operator == "+":
        return left + right == result
    if operator == "-":
        return left - right == result
    if operator == "*":
        return left * right == result
    return right != 0 and left == right * result
