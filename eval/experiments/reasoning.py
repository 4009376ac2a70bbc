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

from pathlib import Path

from eval.reasoning import evaluate_reasoning
from run.setup import choose_device, keep_freed_memory

from .common import Experiment, data_folder, root, run_alone, speed_flags
from .jobs import Job


def train_job(scale, name, seed, student, needs=(), data=None, **more) -> Job:
    """One run of train_distill_reason.py; a value None stands for a switch."""
    flags = (
        ("student", student),
        ("tokenizer", data_folder(scale)),
        ("data", data or f"{data_folder(scale)}/reason_train.jsonl"),
        ("steps", scale.reason_steps),
        ("batch_size", scale.reason_batch),
        ("seed", seed),
        ("eval_every", scale.reason_eval_every),
        ("final_eval", scale.reason_final_eval),
        *speed_flags(scale),
        *more.items(),
    )
    return Job("train_distill_reason", f"{root(scale)}/runs/{name}-s{seed}", flags, needs)


def teacher_job(scale, seed) -> Job:
    return train_job(scale, f"reason-teacher-{scale.reason_teacher}", seed, scale.reason_teacher)


def traces_job(scale, seed) -> Job:
    teacher = teacher_job(scale, seed)
    flags = (
        ("teacher", teacher.out),
        ("prompts", f"{data_folder(scale)}/reason_prompts.jsonl"),
        ("seed", seed),
    )
    out = f"{root(scale)}/runs/traces-of-{scale.reason_teacher}-s{seed}.jsonl"
    return Job("dataset.make_traces", out, flags, (teacher,))


def arms_of(scale) -> list:
    def student(name, **more):
        return lambda seed: train_job(scale, f"reason-{name}", seed, scale.student, **more)

    def with_kl(seed):
        teacher = teacher_job(scale, seed)
        return train_job(scale, "reason-kl", seed, scale.student, (teacher,), teacher=teacher.out)

    def from_teacher(seed):
        traces = traces_job(scale, seed)
        return train_job(
            scale, "reason-teachers-words", seed, scale.student, (traces,), data=traces.out
        )

    return [
        ("teacher", lambda seed: teacher_job(scale, seed)),
        ("answers alone", student("answers", answers_only=None)),
        ("traces, tag 1", student("tag1", tag_weight=1.0)),
        ("traces, tag 10", student("tag10")),
        ("traces and KL", with_kl),
        ("teacher's words", from_teacher),
    ]


def reasoning_row(scale, job: Job) -> dict:
    """The shared columns, and what the model answers on the held-out problems."""
    keep_freed_memory()
    record = job.record()
    folder = Path(job.out)
    problems = f"{data_folder(scale)}/reason_test.jsonl"
    table = evaluate_reasoning(folder, problems, folder / "answers.jsonl", choose_device("auto"))
    teacher = record["args"]["teacher"]
    row = {
        "student_params": record["parameters"],
        "teacher_params": job.needs[0].record()["parameters"] if teacher else "",
        "tokens": record["tokens"],
        "temperature": record["args"]["temperature"] if teacher else "",
        "alpha": record["args"]["alpha"] if teacher else 1.0,
        **record["metrics"],
        "seconds": record["seconds"],
        "peak_memory_mb": record["peak_memory_mb"],
        "accuracy": table[0]["accuracy"],
        **{f"accuracy_{steps}": table[steps]["accuracy"] for steps in range(1, 6)},
        "well_formed": table[0]["well_formed"],
        "verified": table[0]["verified"],
        "think_tokens": table[0]["think_tokens"],
        "device": record["device"],
        "command": job.command,
    }
    return row


def experiment(scale) -> Experiment:
    return Experiment(
        "reasoning", arms_of(scale), scale.seeds, lambda job: reasoning_row(scale, job)
    )


if __name__ == "__main__":
    run_alone(__doc__, experiment)
