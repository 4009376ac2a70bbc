"""Ensemble of teachers: one student learns from what several teachers say together.

    mixture    p(v) = sum_k w_k p_k(v)                  mean of probabilities
    product    p(v) = prod_k p_k(v)^w_k / Z             mean of logits: what one denies is denied
    J = H(sum_k w_k p_k) - sum_k w_k H(p_k)             how much they disagree, 0 to ln K nats
    loss = alpha * CE + (1 - alpha) * T^2 * KL(p || student);  CE alone where J > a threshold

Mistakes that teachers do not share average out (1503.02531; BabyLlama, 2308.02019). w_k = 1/K, or
those whose mixture makes a few labels likeliest (distill/mixture.py). The mean of K KLs has the
gradient of the mixture's KL, and is J larger; their sum is K times that mean.

    KL points to the student; no gradient reaches a teacher; p_k, p and J are those at T.
    All means are over the labels that are not -100, also where J filters: no token is lost.
    Traps: a mean of logits is no mean of probabilities; the surest teacher owns the product; the
    few labels are of the training text: a teacher that knows it by heart is trusted too much.
    Charged: a forward pass per teacher and batch; not their training, nor the passes on the few.

    python -m methods.ensemble                          # one teacher: lesson 2, to the bit
    python train_pretrain.py --seed 1 --out out/teacher1             # a second one
    python -m methods.ensemble --teacher out/teacher,out/teacher1 --combine product

Judged on few: success is 0.02 nats below lesson 2 with the best of the teachers, over 3 seeds.
Try: a teacher of few steps beside a good one, with --learn_weights; --most_disagreement 0.1.
Shapes: B batch, S sequence, N valid tokens, V vocabulary, K teachers.
"""

from argparse import Namespace

import torch

from dataset import add_data_flags, open_data
from distill import at_least_float32, cross_entropy
from distill.mixture import mixture_weights
from files import check_apart, check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"learn_weights": (0, 2**20), "most_disagreement": (0.0, 100.0)}


def compute_loss(student_logits, logits, weights, labels, combine, T, alpha, most_disagreement):
    """The loss, a scalar, and its parts: student_logits (B, S, V), labels (B, S); of the teachers
    logits (K, B, S, V) and weights (K,). entr(p) = -p log p. most_disagreement: nats, or None."""
    student_logits, valid = at_least_float32(student_logits), labels != -100
    N, w, entr = valid.sum().clamp(min=1), weights.view(-1, 1, 1, 1), torch.special.entr
    ce = cross_entropy(student_logits, labels)  # (B, S)
    logits = at_least_float32(logits) / T
    log_probs = logits.log_softmax(-1)
    log_p = mixture = (w.log() + log_probs).logsumexp(0)  # (B, S, V)
    J = entr(mixture.exp()).sum(-1) - (w * entr(log_probs.exp())).sum(-1).sum(0)  # (B, S)
    if combine == "product":
        log_p = (w * logits).sum(0).log_softmax(-1)
    p, log_q = log_p.exp(), (student_logits / T).log_softmax(-1)
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)  # (B, S); 0 log 0 = 0
    kept = valid if most_disagreement is None else valid & (J <= most_disagreement)
    kept_kl, other_ce = torch.where(kept, kl, 0.0).sum(), torch.where(kept, 0.0, ce).sum()
    loss = alpha * (ce.sum() / N) + (1 - alpha) * T**2 * (kept_kl / N) + (1 - alpha) * other_ce / N
    parts = {"ce": ce, "kl": kl, "disagreement": J, "kept": kept.float()}
    return loss, {name: values[valid].sum() / N for name, values in parts.items()}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--combine", choices=("mixture", "product"), default="mixture", help="of --teacher A,B,C")
    add("--learn_weights", type=int, default=0, help="from so many sequences; 0: equal weights")
    add("--most_disagreement", type=float, help="nats of J above that the label alone counts")
    add("--temperature", type=float, default=1.0, help="T")
    add("--alpha", type=float, default=0.5, help="0: the teachers; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/ensemble", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    for folder in (folders := args.teacher.split(",")):
        check_apart(Namespace(out=args.out, teacher=folder))
    run, data = Run(args), open_data(args, args.student, *folders)
    knobs = (args.combine, args.temperature, args.alpha, args.most_disagreement)
    teachers = [run.teacher(folder, data) for folder in folders]
    student = run.student(args.student, data)
    run.optimize(student)
    weights = torch.full((len(teachers),), 1 / len(teachers), device=run.device)
    if args.learn_weights:
        some, labels = (x.to(run.device) for x in data.batch(0, args.learn_weights, args.seed))
        losses = [cross_entropy(teacher(some), labels) for teacher in teachers]  # (B, S) each
        weights = mixture_weights(torch.stack(losses)[:, labels != -100])
        print("weights:", ", ".join(map("{} {:.3f}".format, folders, weights.tolist())))
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                logits = torch.stack([teacher(input_ids) for teacher in teachers])
        loss, parts = compute_loss(student_logits, logits, weights, labels, *knobs)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
