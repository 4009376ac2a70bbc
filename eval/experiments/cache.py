"""What to keep of a teacher: bytes per token, what the student learns, how wrong its gradient is.

    python -m eval.experiments.cache --preset quick --results results/quick

    hidden        the teacher's last hidden state: exact but for float16
    topk k        the k largest probabilities, renormalised: cheap, biased
    tail k        the same file, and one bucket for all other tokens: cheap, biased
    sample k      k tokens, drawn so that the gradient is right on average: cheap, noisy

All students learn from the teacher alone (alpha = 0, T = 1), 3 seeds at every preset. Rows add, for
the trained student on 64 windows of the text: gradient_error, by how much the gradient from the
file differs from the exact one, |g - exact| / |exact|; and gradient_bias, the same for the mean
gradient of 32 independent draws, which for an unbiased method falls to a sixth of its error.
"""

from functools import partial

import torch
from torch import Tensor

from dataset.packing import PackedText
from dataset.teacher_cache import read_header, record_dtype
from distill.sparse import sample, top_k
from methods.cached_teacher import compute_loss
from model import load_model
from model.device import choose_device

from .common import Experiment, run_alone, teacher_of, text_flags, text_row
from .jobs import Job

KEPT, SEEDS, DRAWS, WINDOWS = (4, 16, 64), 3, 32, 64


def cache_job(scale, teacher: Job, method: str, k: int) -> Job:
    """What the teacher says about all windows, in a file; k numbers per token, or hidden states."""
    flags = {"teacher": teacher.out, "data": scale.data, "method": method}
    flags |= {"k": k} if k else {}
    flags |= {"seq_len": scale.seq_len, "data_share": 1.0}
    flags |= {name: value for name, value in scale.flags if name == "dtype"}
    out = f"{teacher.out}-{method}{k or ''}.cache"
    return Job("dataset.teacher_cache", out, tuple(flags.items()), (teacher,))


def student_job(scale, method: str, k: int, seed: int) -> Job:
    teacher = teacher_of(scale, seed)
    cache = cache_job(scale, teacher, "topk" if method == "tail" else method, k)
    flags = {"teacher": teacher.out, "student": scale.student, "teacher_cache": cache.out}
    flags |= {"no_tail": None} if method == "topk" else {}
    flags |= {"alpha": 0.0, **text_flags(scale, seed, scale.text_steps)}
    out = f"{scale.root}/runs/cached-{method}{k or ''}-s{seed}"
    return Job("methods.cached_teacher", out, tuple(flags.items()), (teacher, cache))


def kept_of(log_probs: Tensor, method: str, k: int, seed: int) -> tuple[Tensor, ...]:
    """What a file would hold of log_probs (N, V), in float16."""
    if method == "sample":
        generator = torch.Generator(log_probs.device).manual_seed(seed)
        ids, *numbers = sample(log_probs, k, generator)
    else:
        ids, *numbers = top_k(log_probs, k)
    return ids, *(x.half() for x in numbers)


def gradient_errors(scale, job: Job, method: str, k: int) -> dict[str, float]:
    """gradient_error and gradient_bias of the gradient to the student's head, at its end."""
    device = choose_device("auto")
    text = PackedText(scale.data, "train", scale.seq_len)
    input_ids, labels = text.take(text.window_ids(0, WINDOWS, seed=0))
    input_ids, labels = input_ids.to(device), labels.to(device).flatten()  # (B, S), (N,)
    student, teacher = (load_model(folder, device) for folder in (job.out, job.needs[0].out))
    with torch.no_grad():
        hidden, teacher_hidden = (m.model(input_ids).flatten(0, 1) for m in (student, teacher))
        teacher_logits = teacher.lm_head(teacher_hidden)  # (N, V)

    def gradient(method: str, *kept: Tensor) -> Tensor:
        head = student.lm_head.weight.detach().requires_grad_()
        loss, _ = compute_loss(hidden @ head.T, labels, method, kept, temperature=1.0, alpha=0.0)
        return torch.autograd.grad(loss, head)[0]

    exact = gradient("hidden", teacher_logits)
    if method == "hidden":
        draws = [gradient("hidden", teacher.lm_head(teacher_hidden.half().float()).detach())]
    else:
        log_probs, count = teacher_logits.log_softmax(-1), DRAWS if method == "sample" else 1
        draws = [gradient(method, *kept_of(log_probs, method, k, seed)) for seed in range(count)]
    errors = [float((draw - exact).norm() / exact.norm()) for draw in draws]
    bias = float((torch.stack(draws).mean(0) - exact).norm() / exact.norm())
    return {"gradient_error": sum(errors) / len(errors), "gradient_bias": bias}


def cache_row(scale, job: Job) -> dict:
    flags = dict(job.flags)
    header = read_header(flags["teacher_cache"])
    tail = header["method"] == "topk" and "no_tail" not in flags
    return {
        "bytes_per_token": record_dtype(header).itemsize / header["seq_len"],
        **gradient_errors(scale, job, "tail" if tail else header["method"], header["k"]),
        **text_row(scale, job),
    }


def experiment(scale) -> Experiment:
    kinds = [("hidden", 0), *((method, k) for method in ("topk", "tail", "sample") for k in KEPT)]
    arms = [(f"{m} {k or ''}".strip(), partial(student_job, scale, m, k)) for m, k in kinds]
    return Experiment("cache", arms, SEEDS, partial(cache_row, scale))


if __name__ == "__main__":
    run_alone(__doc__, experiment)
