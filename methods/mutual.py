"""Deep mutual learning: two new students and no teacher, each learns from what the other says.

    loss = sum over i of  alpha * CE_i + (1 - alpha) * T^2 * KL( student j || student i ),   j != i

Started from different weights they make different mistakes, and agreeing on tokens that are not the
label smooths both (DML, Zhang et al. 2017, 1706.00384). Neither knows more than the text tells.

    Each KL points from the other student, who gets no gradient from it: without that both would
    be drawn to what is easy to agree on. Both learn in the same step, from before it (in turns, as
    in the paper, the second would learn from an updated first). Each clips its own gradient.
    Means are over the labels that are not -100; the loss that is logged is the sum of both.
    Charged: both students. The one in --out is the first; the other is in student2/.
    Traps: equal weights and equal batches make both one student, and the KL 0; two models
    together are better than one without any learning from each other: compare `together_loss`.

    python -m methods.mutual                                 # two students: two minutes
    python -m methods.mutual --alpha 1 --out out/apart       # the same two, strangers
    python -m methods.mutual --peer mini                     # the second one larger

Judged on few: success is 0.02 nats below the same two at --alpha 1, each and together, 3 seeds.
Try: --temperature 2; --peer mini (does the small one learn more from a large beginner?).
Shapes: B batch, S sequence, V vocabulary.
"""

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from model import PRESETS
from run import Run, add_common_flags, command_line, loss_together, new_parser


def compute_loss(first_logits, second_logits, labels, T: float, alpha: float):
    """The sum of both students' losses, a scalar, and the parts of each: logits (B, S, V) of the
    two, labels (B, S)."""
    valid, loss, parts = labels != -100, 0.0, {}
    pairs = ((first_logits, second_logits, ""), (second_logits, first_logits, "_2"))
    for own, other, ending in pairs:
        ce = weighted_mean(cross_entropy(own, labels), valid)
        kl = weighted_mean(kl_divergence(own, other.detach(), T), valid)
        loss = loss + alpha * ce + (1 - alpha) * T**2 * kl
        parts |= {f"ce{ending}": ce, f"kl{ending}": kl}
    return loss, parts


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--student", default="nano", help="preset (nano, micro, ...) or checkpoint folder")
    add("--peer", help="the same of the second student; without: as --student, other weights")
    add("--temperature", type=float, default=1.0, help="T")
    add("--alpha", type=float, default=0.5, help="0: the other student; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/mutual", fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    peer = args.peer or args.student
    if peer == args.student and peer not in PRESETS:
        same = f"--student {peer} twice is one student, who has nothing to tell itself"
        raise ValueError(f"{same}: pass a preset, or another folder as --peer")
    run, data = Run(args), open_data(args, args.student, peer)
    first, second = run.student(args.student, data), run.student(peer, data)
    run.optimize(first)
    run.optimize(second)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            logits = first(input_ids), second(input_ids)  # (B, S, V) each
        loss, parts = compute_loss(*logits, labels, args.temperature, args.alpha)
        run.step(loss, **parts)
    held_out = data.held_out.evaluation(args.batch_size, args.final_eval)
    return run.finish(together_loss=lambda: loss_together([first, second], held_out))


if __name__ == "__main__":
    command_line(main, parse_args())
