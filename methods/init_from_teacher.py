"""Student cut out of its teacher: it starts from some of the teacher's layers, then is distilled.

    student layer l = teacher layer round( l (L_t - 1) / (L_s - 1) ),    l = 0 ... L_s - 1
    channels kept   = the D with the largest mean |x| after the norms, the same in every matrix
    loss            = alpha * CE + (1 - alpha) * KL(teacher || student)

Layers that a teacher has learned are a better start than random ones (DistilBERT, 1910.01108). A
narrower student keeps whole channels of the residual stream, and in every layer its own heads and
feed-forward units (Minitron, 2407.14679, 2408.11796): model/prune.py. KL points to the student; no
gradient reaches the teacher; means are over labels that are not -100.
Charged: the teacher's forward passes, unless --alpha is 1; not the four that rank the channels.
Traps: channels that one matrix keeps and another drops; a gain of the start that is told as one of
distillation (hence the 2 x 2 below); a rate at which a good copy forgets (cut to half its width, on
few after 60 steps, 0.012 is best: 4.10 nats, 4.17 at 0.006; of whole layers it is less by default).

    python -m methods.init_from_teacher                           # copied, half CE, half KL
    python -m methods.init_from_teacher --alpha 1                 # copied, CE; out of four:
    python -m methods.init_from_teacher --init random --alpha 1   # {random, copied} x {CE, KD}
    python -m methods.init_from_teacher --student layers:2        # as DistilBERT: fewer layers only

Judged on few: success is 0.02 nats below --init random with the same alpha over 3 seeds.
Try: --width first (channels nobody ranked), --width full --steps 20 (how soon is it repaired?).
Shapes: B batch, S sequence, V vocabulary, D width, L_s and L_t layers of the two.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from model import Transformer, layers_named, load_for
from model.prune import even_layers, importance, prune, smaller_shape
from run import Run, add_common_flags, command_line, new_parser

RANKED = 4  # batches of training data whose activations rank channels, heads and units
RANGES = {"layers": (0, 1000)}


def compute_loss(student_logits, teacher_logits, labels, alpha: float):
    """The loss and its parts: logits (B, S, V), the teacher's None if alpha is 1; labels (B, S)."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    if teacher_logits is None:
        return ce, {"ce": ce}
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, 1.0), valid)
    return alpha * ce + (1 - alpha) * kl, {"ce": ce, "kl": kl}


def cut_out(args, teacher: Transformer, batches: list[Tensor]) -> Transformer | str:
    """The student before its first step: the teacher's configuration with the sizes of a preset, as
    --width allows; batches of input_ids (B, S) rank what is kept. Whole layers: Run takes them."""
    shape = smaller_shape(teacher.config, args.student, args.layers, whole=args.width == "full")
    if args.init == "random":
        return Transformer(shape)
    if args.width == "full" or layers_named(args.student):
        return f"layers:{shape.num_hidden_layers}"
    ranks = importance(teacher, batches)
    if args.width == "first":  # channels have no order of their own: as good as chance
        ranks = {name: -torch.arange(x.shape[-1]).expand_as(x) for name, x in ranks.items()}
    kept = even_layers(shape.num_hidden_layers, teacher.config.num_hidden_layers)
    return prune(teacher, shape, kept, ranks)


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--init", choices=("copied", "random"), default="copied", help="what the student starts as")
    add("--layers", type=int, default=0, help="of the student; 0: as many as the preset has")
    width = "how much of a layer is kept: the preset's sizes by importance, or the first, or all"
    add("--width", choices=("importance", "first", "full"), default="importance", help=width)
    add("--alpha", type=float, default=0.5, help="0: teacher; 1: labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/init_from_teacher", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    if args.fsdp:
        raise ValueError("--fsdp has no whole teacher, to be cut from: leave --fsdp out")
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher, data)
    batches = [data.batch(n, args.batch_size, args.seed)[0] for n in range(RANKED)]
    whole = teacher if args.teacher_dtype == "float32" else load_for(args.teacher, data, run.device)
    student = run.student(cut_out(args, whole, [x.to(run.device) for x in batches]), data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids) if args.alpha < 1 else None
        loss, parts = compute_loss(student_logits, teacher_logits, labels, args.alpha)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
