"""What traces are worth: one student size, taught to answer in six ways.

    python -m eval.experiments.reasoning --preset quick

    teacher          a larger model on gold traces, tag weight 10
    answers alone    the same problems, the <think> spans removed
    traces, tag 1    gold traces, every token of weight 1
    traces, tag 10   gold traces, the four tags of weight 10
    traces and KL    gold traces, tag weight 10, and the teacher's distribution
    teacher's words  traces that the teacher wrote for problems without a gold trace, tag weight 10

Students make the same number of steps from the same initial weights. Rows add the accuracy for
each number of steps (5 was never trained), the share of well-formed and of verified traces, and
the mean tokens thought; every answer is in the run's answers.jsonl.
"""

from functools import partial
from pathlib import Path

from eval.reasoning import evaluate_reasoning
from model.device import choose_device, keep_freed_memory

from .common import Experiment, run_alone, run_row
from .jobs import Job


def train_job(scale, name, student, seed, needs=(), **more) -> Job:
    """One run of train_distill_reason.py; a value None stands for a switch."""
    flags = {
        "student": student, "tokenizer": scale.data, "data": f"{scale.data}/reason_train.jsonl",
        "steps": scale.reason_steps, "batch_size": scale.reason_batch, "seed": seed,
        "eval_every": scale.reason_eval_every, "final_eval": scale.reason_final_eval,
        **dict(scale.flags), **more,
    }  # fmt: skip
    out = f"{scale.root}/runs/{name}-s{seed}"
    return Job("train_distill_reason", out, tuple(flags.items()), needs)


def teacher_job(scale, seed) -> Job:
    return train_job(scale, f"reason-teacher-{scale.reason_teacher}", scale.reason_teacher, seed)


def traces_job(scale, seed) -> Job:
    teacher = teacher_job(scale, seed)
    prompts = f"{scale.data}/reason_prompts.jsonl"
    flags = (("teacher", teacher.out), ("prompts", prompts), ("seed", seed))
    out = f"{scale.root}/runs/traces-of-{scale.reason_teacher}-s{seed}.jsonl"
    return Job("dataset.make_traces", out, flags, (teacher,))


def arms_of(scale) -> list:
    def student(name, **more):
        return partial(train_job, scale, f"reason-{name}", scale.student, **more)

    def with_kl(seed):
        teacher = teacher_job(scale, seed)
        return student("kl", needs=(teacher,), teacher=teacher.out)(seed)

    def from_teacher(seed):
        traces = traces_job(scale, seed)
        return student("teachers-words", needs=(traces,), data=traces.out)(seed)

    return [
        ("teacher", partial(teacher_job, scale)),
        ("answers alone", student("answers", answers_only=None)),
        ("traces, tag 1", student("tag1", tag_weight=1.0)),
        ("traces, tag 10", student("tag10")),
        ("traces and KL", with_kl),
        ("teacher's words", from_teacher),
    ]


def reasoning_row(scale, job: Job) -> dict:
    """The shared columns, and what the model answers on the held-out problems."""
    keep_freed_memory()
    problems, answers = f"{scale.data}/reason_test.jsonl", Path(job.out) / "answers.jsonl"
    table = evaluate_reasoning(job.out, problems, answers, choose_device("auto"))
    columns = {f"accuracy_{steps}": table[steps]["accuracy"] for steps in range(1, 6)}
    names = ("accuracy", "well_formed", "verified", "think_tokens")
    return {**{name: table[0][name] for name in names}, **columns, **run_row(job)}


def experiment(scale) -> Experiment:
    return Experiment("reasoning", arms_of(scale), scale.seeds, partial(reasoning_row, scale))


if __name__ == "__main__":
    run_alone(__doc__, experiment)
