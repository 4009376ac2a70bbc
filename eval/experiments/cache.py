"""What to keep of a teacher: bytes a token, what the student learns, and how wrong its gradient is.

    python -m eval.experiments.cache --preset quick --results results/quick

    hidden        the teacher's last hidden state: exact but for float16
    top k         the k largest probabilities and one tail bucket: cheap, biased
    sample k      k tokens, drawn so that the gradient is right on average: cheap, noisy

All students learn from the teacher alone (alpha = 0, T = 1), 3 seeds at every preset. Rows add, for
the trained student on 64 windows of the text: gradient_error, by how much the gradient from the
file differs from the exact one, |g - exact| / |exact|; and gradient_bias, the same for the mean
gradient of 32 independent draws, which for an unbiased method falls to a sixth of its error.
"""

import torch
from torch import Tensor

from dataset.cache_teacher import sample, top_k
from dataset.packing import PackedText
from distill import HiddenTeacher, SparseTeacher, fused_mixed_loss
from model import load_model
from run.files import read_json
from run.setup import choose_device

from .common import (
    Experiment,
    data_folder,
    distilled,
    pretrained,
    run_alone,
    teacher_cache,
    text_row,
)
from .jobs import Job

KEPT, SEEDS, DRAWS, WINDOWS = (4, 16, 64), 3, 32, 64


def student_job(scale, seed: int, method: str, k: int) -> Job:
    teacher = pretrained(scale, scale.teacher, seed)
    if method == "hidden":
        return distilled(scale, seed, alpha=0.0)
    cache = teacher_cache(scale, teacher, method, k)
    return distilled(scale, seed, alpha=0.0, cache=cache)


def says(method: str, k: int, logits: Tensor, seed: int) -> SparseTeacher:
    """What the file would hold for teacher logits (N, V)."""
    log_probs = logits.log_softmax(-1)
    if method == "topk":
        ids, kept, rest = top_k(log_probs, k)
        return SparseTeacher(ids, kept.exp(), tail=rest.exp())
    ids, weights, entropy = sample(log_probs, k, torch.Generator(logits.device).manual_seed(seed))
    return SparseTeacher(ids, weights.exp().float(), entropy=entropy.float())


def gradient_errors(scale, job: Job, teacher_folder: str, method: str, k: int) -> dict[str, float]:
    """gradient_error and gradient_bias of the gradient to the student's logits, at its end."""
    device = choose_device("auto")
    text = PackedText(data_folder(scale), "train", scale.seq_len)
    input_ids, _ = text.take(text.window_ids(0, WINDOWS, seed=0))
    student, teacher = load_model(job.out, device), load_model(teacher_folder, device)
    with torch.no_grad():
        hidden = student.model(input_ids.to(device)).flatten(0, 1)
        teacher_hidden = teacher.model(input_ids.to(device)).flatten(0, 1)
        logits = teacher.lm_head(teacher_hidden)

    def gradient(teacher_says) -> Tensor:
        """To the head: every token's logits, averaged as a step of training averages them."""
        head = student.lm_head.weight.detach().requires_grad_()
        loss = fused_mixed_loss(hidden, head, teacher_says, None, alpha=0.0)
        return torch.autograd.grad(loss, head)[0]

    exact = gradient(HiddenTeacher(teacher_hidden, teacher.lm_head.weight))
    if method == "hidden":
        kept = teacher_hidden.half().float()
        draws = [gradient(HiddenTeacher(kept, teacher.lm_head.weight))]
    else:
        count = DRAWS if method == "sample" else 1
        draws = [gradient(says(method, k, logits, seed)) for seed in range(count)]
    mean = torch.stack(draws).mean(0)
    errors = [float((draw - exact).norm() / exact.norm()) for draw in draws]
    return {
        "gradient_error": sum(errors) / len(errors),
        "gradient_bias": float((mean - exact).norm() / exact.norm()),
    }


def experiment(scale) -> Experiment:
    kinds = {"hidden": ("hidden", 0)}
    kinds |= {f"top {k}": ("topk", k) for k in KEPT} | {f"sample {k}": ("sample", k) for k in KEPT}
    names = {}  # output folder -> its method and k

    def arm(method, k):
        def job_of(seed):
            job = student_job(scale, seed, method, k)
            names[job.out] = (method, k)
            return job

        return job_of

    def reference(job: Job) -> Job:
        return pretrained(scale, scale.teacher, dict(job.flags)["seed"])

    def row_of(job: Job) -> dict:
        teacher = reference(job)
        cache = read_json(dict(job.flags)["teacher_cache"] + ".finished.json")
        return {
            **text_row(scale, job, teacher),
            "bytes_per_token": cache["bytes_per_token"],
            **gradient_errors(scale, job, teacher.out, *names[job.out]),
        }

    arms = [(name, arm(*kind)) for name, kind in kinds.items()]
    return Experiment("cache", arms, SEEDS, row_of, reference)


if __name__ == "__main__":
    run_alone(__doc__, experiment)
