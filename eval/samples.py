"""What the models write: one text continued, one problem reasoned, by teacher and students.

python -m eval.reproduce prints it in the end, and puts it into RESULTS/README.md.
"""

from pathlib import Path

from dataset.answers import is_answer
from dataset.problems import check_response
from dataset.replies import read_problems, write_replies
from dataset.tokenizer import decode, load_tokenizer
from eval.chat import complete
from eval.experiments import headline, reasoning
from eval.experiments.jobs import Job
from model import load_model

PROMPT = "**KING LEAR**  \nTell me, my daughters"  # a play that nobody was trained on
NEW_TOKENS, STEPS = 60, 3


def finished(arms: list, names: tuple[str, ...]) -> dict[str, Job]:
    """The runs of seed 0 of those arms that are done."""
    jobs = {arm: job_of(0) for arm, job_of in arms if arm in names}
    return {arm: jobs[arm] for arm in names if arm in jobs and jobs[arm].is_done()}


def continuations(scale, arms=("teacher", "plain", "distilled")) -> list[tuple[str, str]]:
    """(arm, the prompt and what it wrote), sampled with one seed."""
    written = []
    for arm, job in finished(headline.experiment(scale).arms, arms).items():
        model, tokenizer = load_model(job.out), load_tokenizer(job.out)
        written.append((arm, PROMPT + complete(model, tokenizer, PROMPT, NEW_TOKENS, seed=0)))
    return written


def solutions(scale, arms=("teacher", "traces, tag 1", "answers alone")) -> list[tuple[str, str]]:
    """The first held-out problem of STEPS steps, then (arm and what is right, its greedy reply)."""
    path = Path(scale.data) / "reason_test.jsonl"
    problem = next((p for p in read_problems(path) if p["steps"] == STEPS), None)
    if problem is None:
        return []
    question = problem["turns"][-1]["content"]
    written = [("problem", question)]
    for arm, job in finished(reasoning.experiment(scale).arms, arms).items():
        model, tokenizer = load_model(job.out), load_tokenizer(job.out)
        reply = decode(tokenizer, write_replies(model, tokenizer, [problem])[0])
        check = check_response(question, reply)
        right = "right" if is_answer(reply, problem["answer"]) else "wrong"
        lines = ", every line verified" if check.verified else ""
        written.append((f"{arm} ({right}{lines})", reply))
    return written


def samples(scale) -> str:
    """Markdown: a title and a block for each."""
    blocks = [*continuations(scale), *solutions(scale)]
    return "\n\n".join(f"**{title}**\n\n```\n{text}\n```" for title, text in blocks)
