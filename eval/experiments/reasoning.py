"""What traces are worth: one student size, taught to answer in several ways.

    python -m eval.experiments.reasoning --preset quick

    teacher          a larger model on gold traces, trained until it is good
    answers alone    the same problems, the <think> spans removed
    traces, tag 1    gold traces, every token of weight 1; also with tags of weight 3 and 10
    teacher's words  traces that the teacher wrote for problems without a gold trace
    traces and KL    gold traces, and the teacher's distribution

Students make the same number of steps from the same initial weights. Rows add the accuracy for
each number of steps (5 was never trained), the share of well-formed and of verified traces, and
the mean tokens thought; every answer is in the run's answers.jsonl. On hard problems (facts
shuffled, larger numbers) there are the teacher, answers alone and gold traces.
"""

from functools import partial
from pathlib import Path

from eval.reasoning import evaluate_reasoning
from files import known_hash
from model.device import choose_device, keep_freed_memory

from .common import Experiment, experiment_main, run_experiments, run_row
from .jobs import Job


def train_job(scale, name, model, steps, seed, needs=(), data=None, folder=None, **more) -> Job:
    """One run of train_distill_reason.py on `data`, gold traces unless another file is named."""
    folder = folder or scale.data
    flags = {
        "student": model, "tokenizer": folder, "data": data or f"{folder}/reason_train.jsonl",
        "steps": steps, "batch_size": scale.reason_batch, "seed": seed, "tag_weight": 1.0,
        "eval_every": scale.reason_eval_every, "final_eval": scale.reason_final_eval,
        **dict(scale.flags), **more,
    }  # fmt: skip
    out = f"{scale.root}/runs/{name}-s{seed}"
    return Job("train_distill_reason", out, tuple(flags.items()), needs)


def teacher_job(scale, seed) -> Job:
    size, steps = scale.reason_teacher, scale.reason_teacher_steps
    return train_job(scale, f"reason-teacher-{size}", size, steps, seed)


def traces_job(scale, seed) -> Job:
    teacher = teacher_job(scale, seed)
    prompts = f"{scale.data}/reason_prompts.jsonl"
    flags = (("teacher", teacher.out), ("prompts", prompts), ("seed", seed))
    out = f"{scale.root}/runs/traces-of-{scale.reason_teacher}-s{seed}.jsonl"
    return Job("dataset.make_traces", out, flags, (teacher,))


def easy_arms(scale) -> list:
    def student(name, seed, **more):
        return train_job(scale, f"reason-{name}", scale.student, scale.reason_steps, seed, **more)

    def weighted(weight):
        return partial(student, f"tag{weight:g}", tag_weight=weight)

    def from_teacher(seed):
        traces = traces_job(scale, seed)
        return student("teachers-words", seed, needs=(traces,), data=traces.out)

    def with_kl(seed):
        teacher = teacher_job(scale, seed)
        return student("kl", seed, needs=(teacher,), teacher=teacher.out)

    arms = [
        ("teacher", partial(teacher_job, scale)),
        ("answers alone", partial(student, "answers", answers_only=None)),
        *((f"traces, tag {weight:g}", weighted(weight)) for weight in scale.tag_weights),
        ("teacher's words", from_teacher),
    ]
    return [*arms, ("traces and KL", with_kl)] if scale.with_kl else arms


def hard_arms(scale) -> list:
    def hard(name, model, seed, **more):
        name, folder = f"hard-{name}", scale.hard_data
        return train_job(scale, name, model, scale.hard_steps, seed, folder=folder, **more)

    return [
        ("teacher", partial(hard, "teacher", scale.reason_teacher)),
        ("answers alone", partial(hard, "answers", scale.student, answers_only=None)),
        ("traces, tag 1", partial(hard, "tag1", scale.student)),
    ]


def reasoning_row(scale, job: Job) -> dict:
    """The shared columns, and what the model answers on the held-out problems."""
    keep_freed_memory()
    problems = f"{dict(job.flags)['tokenizer']}/reason_test.jsonl"
    answers = Path(job.out) / "answers.jsonl"
    table = evaluate_reasoning(job.out, problems, answers, choose_device("auto"))
    columns = {
        f"{what}_{steps}": table[steps][what]
        for what in ("accuracy", "verified")
        for steps in range(1, 6)
    }
    names = ("accuracy", "well_formed", "verified", "think_tokens")
    row = {**{name: table[0][name] for name in names}, **columns, **run_row(job)}
    return {**row, "problems_sha256": known_hash(problems)[:12]}


def experiment(scale) -> Experiment:
    row_of = partial(reasoning_row, scale)
    return Experiment("reasoning", easy_arms(scale), scale.more_seeds, row_of)


def hard_experiment(scale) -> Experiment:
    seeds = scale.seeds if scale.hard_steps else 0
    return Experiment("reasoning_hard", hard_arms(scale), seeds, partial(reasoning_row, scale))


if __name__ == "__main__":
    experiment_main(
        __doc__,
        lambda scale, results: run_experiments(
            [experiment(scale), hard_experiment(scale)], results
        ),
    )
