"""Self-distillation: the student's last layer teaches exits after the layers before it.

    q_k  = softmax(head(norm(state after layer k))),  k = 1 .. L; one norm and head for all
    loss = CE_L + weight * mean over k < L of  alpha * CE_k + (1 - alpha) * T^2 * KL( q_L || q_k )

The deep exit is the best teacher that costs nothing, and an exit that is trained can be used: easy
tokens leave early (Be Your Own Teacher, Zhang et al. 2019, 1905.08094, whose exits have heads of
their own and also match hidden states; not done here).

    KL points from the last exit, which gets no gradient from it: otherwise the deep exit would
    chase the shallow ones. It feels them all the same, through shared layers, norm and head.
    Means are over the labels that are not -100. weight = 0 is plain training.
    Charged: a head per exit, which in a small model is much: nano's is more than both its layers.
    Trap: the exit after the last layer is the model; states[0] is the embedding and no exit.

    python -m methods.self_distillation --student micro
    python -m eval.anytime --model out/self_distillation     # depth and loss for each threshold
    python -m methods.self_distillation --student micro --alpha 1 --out out/exits_by_labels

Judged on few: success is a last exit no worse than plain by 0.02 nats, and shallow exits better by
0.02 than with --alpha 1, over 3 seeds. Expected at this size: the first, and little saved.
Try: --weight 0 and then eval.anytime (what do exits say that nobody trained?); --temperature 2.
Shapes: B batch, S sequence, V vocabulary, D width, L layers.
"""

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from model import Record
from model.exits import exit_logits
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"weight": (0.0, 1e6)}


def compute_loss(shallow: list, deep, labels, weight: float, T: float, alpha: float):
    """The loss, a scalar, and its parts: logits (B, S, V) of each shallow exit and of the deep one,
    labels (B, S)."""
    valid, n = labels != -100, len(shallow)
    ce = weighted_mean(cross_entropy(deep, labels), valid)
    exit_ce = sum(weighted_mean(cross_entropy(logits, labels), valid) for logits in shallow) / n
    teacher = deep.detach()
    exit_kl = sum(weighted_mean(kl_divergence(logits, teacher, T), valid) for logits in shallow) / n
    loss = ce + weight * (alpha * exit_ce + (1 - alpha) * T**2 * exit_kl)
    return loss, {"ce": ce, "exit_ce": exit_ce, "exit_kl": exit_kl}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--student", default="nano", help="preset (nano, micro, ...) or checkpoint folder")
    add("--weight", type=float, default=0.5, help="of the shallow exits")
    add("--temperature", type=float, default=1.0, help="T")
    add("--alpha", type=float, default=0.5, help="0: the deep exit; 1: labels, for shallow exits")
    add_data_flags(parser)
    add_common_flags(parser, out="out/self_distillation", fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run, data = Run(args), open_data(args, args.student)
    student = run.student(args.student, data)
    if len(student.model.layers) < 2:
        raise ValueError(f"{args.student} has 1 layer, so no exit before it: take a deeper student")
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            record = Record("hidden")
            deep = student(input_ids, record=record)  # (B, S, V)
            shallow = exit_logits(student, record.hidden[1:-1])  # L - 1 of (B, S, V)
        knobs = (args.weight, args.temperature, args.alpha)
        loss, parts = compute_loss(shallow, deep, labels, *knobs)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
