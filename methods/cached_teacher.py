"""Learn from what a teacher said once: many students for one teacher's cost.

    loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), the KL from k numbers per token:

    topk      renormalised on the k kept tokens:         sum_k p/P log( (p/P) / (q/Q) )
    tail      and one bucket for all others:             sum_k p log(p/q) + (1-P) log( (1-P)/(1-Q) )
    sample    weights w with E[w_v] = p_v, H entropy:    -H - sum_k w log q
    hidden    the teacher's hidden state:                the whole KL, one matrix product more

topk is blind to what it dropped, tail to how that is spread; sample is right on average
(2503.16870). KL points to the student; means: over labels that are not -100. Charged: nothing of
the teacher. Trap: float16 probabilities do not sum to 1.

    python -m dataset.teacher_cache && python -m methods.cached_teacher
    python -m dataset.teacher_cache --method topk --k 8                 # writes out/topk.cache
    python -m methods.cached_teacher --teacher_cache out/topk.cache --no_tail --out out/topk

Judged on text: success is within 0.01 nats of the live teacher (eval/experiments/cache.py).
Try: --alpha 0; --k 4, with and without --no_tail.
Shapes: B batch, S sequence, V vocabulary, k kept tokens.
"""

import torch

from dataset import PackedText
from dataset.teacher_cache import CachedText
from distill import at_least_float32, kl_divergence, weighted_mean
from run import Run, add_common_flags, command_line, new_parser


def kept_kl(log_q, method: str, log_p, rest):
    """KL (B, S) from log_q and log_p (B, S, k) of student and file, and the file's rest (B, S)."""
    log_p, rest = log_p.to(log_q.dtype), rest.to(log_q.dtype)
    p, p_tail = log_p.exp(), rest.exp() if method == "tail" else 0.0
    total = p.sum(-1) + p_tail  # 1, but for float16 and what topk leaves out
    p = p / total[..., None]
    if method == "topk":
        log_q = log_q.log_softmax(-1)  # on the k tokens alone
    cross = -torch.where(p == 0, 0.0, p * log_q).sum(-1)  # 0 log 0 = 0
    if method == "sample":
        return cross - rest
    kl = cross + torch.xlogy(p, p).sum(-1)
    if method == "tail":
        p_tail, q_tail = p_tail / total, (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
        kl = kl + torch.xlogy(p_tail, p_tail) - torch.xlogy(p_tail, q_tail)
    return kl


def compute_loss(student_logits, labels, method: str, kept, temperature: float, alpha: float):
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, and its two parts: student_logits (B, S, V),
    labels (B, S); kept: ids, log_p (B, S, k), rest; for "hidden" the teacher's logits (B, S, V)."""
    valid, parts, T = labels != -100, {}, temperature
    log_probs = at_least_float32(student_logits).log_softmax(-1)
    seen = [] if method == "hidden" else kept[:1]  # one gather, as its gradient is (B, S, V)
    log_q = log_probs.gather(-1, torch.cat([labels.masked_fill(~valid, 0)[..., None], *seen], -1))
    if alpha > 0:
        parts["ce"] = weighted_mean(-log_q[..., 0], valid)
    if alpha < 1 and method == "hidden":
        parts["kl"] = weighted_mean(kl_divergence(student_logits, kept[0], T), valid)
    elif alpha < 1:
        log_z = 0 if T == 1 else (log_probs / T).logsumexp(-1, keepdim=True)
        parts["kl"] = weighted_mean(kept_kl(log_q[..., 1:] / T - log_z, method, *kept[1:]), valid)
    factors = {"ce": alpha, "kl": (1 - alpha) * T**2}
    return sum(factors[name] * value for name, value in parts.items()), parts


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--teacher_cache", default="out/sample.cache", help="what it wrote")
    parser.add_argument("--no_tail", action="store_true", help="of a topk file: only its k tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="T")
    parser.add_argument("--alpha", type=float, default=0.5, help="0: teacher; 1: labels")
    parser.add_argument("--data", default="out/data", help="folder made by dataset.prepare")
    parser.add_argument("--data_share", type=float, default=1.0, help="share of the text")
    add_common_flags(parser, out="out/cached_student", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    if args.fsdp:
        raise ValueError("--fsdp has no whole teacher, as a cache needs: leave --fsdp out")
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len, args.data_share)
    teacher = run.teacher(args.teacher, text)  # for its head, and to evaluate beside it
    text = CachedText(text, args.teacher_cache, args.teacher, args.temperature)
    method = "tail" if text.method == "topk" and not args.no_tail else text.method
    student, T, alpha = run.student(args.student, text), args.temperature, args.alpha
    run.optimize(student)
    for input_ids, labels, *kept in run.batches(text):  # (B, S) each, then the file's (B, S, ...)
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            if method == "hidden":
                kept = [teacher.lm_head(kept[0].float())]
        loss, parts = compute_loss(student_logits, labels, method, kept, T, alpha)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
