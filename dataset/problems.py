"""Grade-school word problems with traces that a program can check line by line.

    Compared with Ben, Cal has 3 times as many pens. Now Ann has 12 pens. There are 7 caps in a
    box. Compared with Ann, Ben has 5 more pens. How many pens does Cal have?

    <think>
     Ann has 12 pens: Ann=12
     Ann, Ben has 5 more pens: Ben=12+5=17
     Ben, Cal has 3 times as many pens: Cal=17*3=51
    </think>
    <answer>
    51
    </answer>

A problem of n steps is a chain: each quantity is computed from the one before (more, fewer, times,
shared equally) or from that and an earlier one (a total). Distractors are mixed in (other things,
other people), and all facts stand in shuffled order.

A line of the trace quotes a fact, then computes. The wording is chosen so that the next fact can be
found by looking for the last name and copying what follows it, which a Transformer of two layers
learns within a few hundred steps. With facts worded the other way round ("Ben has 5 more pens than
Ann"), or traces of bare equations, models of up to 1M parameters did not learn in 50,000 examples
which number belongs to whom. For the same reason every name has a space before it: to a byte-level
tokenizer " Ann" and "Ann" are unrelated tokens.

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
GIVEN = re.compile(r"\w+=([0-9]{1,40})")
EQUATION = re.compile(r"\w+=([0-9]{1,40})([-+*/])([0-9]{1,40})=([0-9]{1,40})")
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
        """What the lines compute, without names: "12+5=17"."""
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
    told = f" {people[0]} has {values[0]} {thing}"  # what the question says and a line quotes
    facts, lines = [f"Now{told}."], [f"{told}: {people[0]}={values[0]}"]
    for step in range(1, steps + 1):
        name, before, value = people[step], people[step - 1], values[-1]
        kinds = ["more", "fewer", "times", "share"] + ["total"] * (step > 1)
        kind = rng.choice(kinds)
        number = rng.randint(2, 20) if kind in ("more", "fewer") else rng.randint(2, 5)
        if kind == "more":
            result, equation = value + number, f"{value}+{number}"
            told = f"{number} more {thing}"
        elif kind == "fewer":
            result, equation = value - number, f"{value}-{number}"
            told = f"{number} fewer {thing}"
        elif kind == "times":
            result, equation = value * number, f"{value}*{number}"
            told = f"{number} times as many {thing}"
        elif kind == "share":
            if value % number:
                return None
            result, equation = value // number, f"{value}/{number}"
            told = f"one of {number} equal shares of the {thing}"
        else:
            earlier = rng.randrange(step - 1)
            result, equation = value + values[earlier], f"{value}+{values[earlier]}"
            told = f"as many {thing} and those of {people[earlier]} in total"
        if not 1 <= result <= LARGEST:
            return None
        told = f" {before}, {name} has {told}"
        values.append(result)
        facts.append(f"Compared with{told}.")
        lines.append(f"{told}: {name}={equation}={result}")
    asked = f"How many {thing} does {people[steps]} have?"
    # Distractors: things in a box, and what one more person has of them beside another.
    if rng.random() < 0.5:
        facts.append(f"There are {rng.randint(2, 30)} {other_thing} in a box.")
        if rng.random() < 0.5:
            owner, other_owner = people[steps + 1 :]
            number = rng.randint(2, 20)
            facts.append(f"Compared with {owner}, {other_owner} has {number} more {other_thing}.")
    rng.shuffle(facts)
    return Problem(" ".join([*facts, asked]), tuple(lines), values[-1])


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

    A line verifies if it quotes the question word for word, then a colon, then "name=a" with a
    number of the question, or "name=a op b=c" with c right and with a and b from the question or
    computed by a line above. The quote may be left out.
    """
    answer_match = ANSWER.search(response)
    answer = int(answer_match.group(1)) if answer_match else None
    match = RESPONSE.fullmatch(response.strip())
    if match is None or any(tag in match.group(1) for tag in ("<think>", "<answer>", "</")):
        return TraceCheck(False, False, answer)
    asked = {int(number) for number in re.findall(r"[0-9]{1,40}", question)}
    known, result, computed = set(asked), None, False
    for line in match.group(1).split("\n"):
        quote, _, claim = line.rpartition(":")
        if quote.strip() not in question:
            return TraceCheck(True, False, answer)
        given, equation = GIVEN.fullmatch(claim.strip()), EQUATION.fullmatch(claim.strip())
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
