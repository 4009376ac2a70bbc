"""Layer by layer: each student layer first learns to say what a teacher layer says, then all learn.

    phase l = 1 ... L_s   | W_l n(h_l) - n(t_m(l)) |^2 / E,   m(l) = ceil( l L_t / L_s )
    last phase            alpha * CE + (1 - alpha) * KL(teacher || student)

h_l (B, S, D) is the student's state after its layer l, t (B, S, E) the teacher's, n divides by the
root mean square, W_l (D -> E) is learned and thrown away. In phase l layer l alone learns (in phase
1 also the embedding), fed by the student's own layers below: a near target (MobileBERT, 2004.02984;
TED, 2210.01351). KL points to the student; no gradient reaches the teacher or a frozen layer; means
are over labels that are not -100. Traps: a tied head that still moves the frozen embedding; an
optimizer that shrinks frozen weights; the held-out loss of a layer's phase, whose head is new.
Charged: all phases, together the steps of one run; a layer's has no head, but both bodies whole.

    python -m methods.progressive_layers

Judged on few: success is 0.02 nats below --share 0, plain distillation, over 3 seeds.
Try: --share 0.8; --student micro (three phases).
Shapes: B batch, S sequence, V vocabulary, D and E widths, L_s and L_t layers of the two models.
"""

from functools import partial

import torch
from torch import nn

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from distill.hidden import hidden_state_loss, layer_pairs
from files import check_ranges
from model import Record, number_of_layers
from model.freeze import freeze_but
from run import Run, add_common_flags, command_line, new_parser, run_phase

RANGES = {"share": (0.0, 0.95)}


def compute_loss(student_logits, teacher_logits, labels, alpha: float):
    """alpha * CE + (1 - alpha) * KL and its two parts: logits (B, S, V), labels (B, S)."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, 1.0), valid)
    return alpha * ce + (1 - alpha) * kl, {"ce": ce, "kl": kl}


def train_layer(args, number: int) -> None:
    run, data = Run(args), open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    freeze_but(student, number)
    _, m = layer_pairs("uniform", len(student.model.layers), len(teacher.model.layers))[number - 1]
    project = nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False)
    run.optimize(student, project)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            mine, theirs = Record("hidden"), Record("hidden")
            student.model.forward(input_ids, record=mine)  # the body alone: no logits
            with torch.no_grad():
                teacher.model.forward(input_ids, record=theirs)
            loss = hidden_state_loss(mine.hidden[number], theirs.hidden[m], labels != -100, project)
        run.step(loss, hidden=loss)
    run.finish()


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--share", type=float, default=0.5, help="of the steps, for the layers one by one")
    add("--alpha", type=float, default=0.5, help="of the last phase: 0: teacher; 1: labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/progressive_layers", pair=True, fused=False)
    parser.set_defaults(optimizer="muon", learning_rate=0.012)  # in each phase as for a new model
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    if args.flops or args.seconds or args.fsdp or args.student.startswith("layers:"):
        raise ValueError("a new model has --steps: leave --flops, --seconds, --fsdp, layers:N out")
    layers = number_of_layers(args.student)
    steps = max(1, round(args.steps * args.share / layers)) if args.share else 0  # of a layer
    if args.steps <= steps * layers:
        raise ValueError(f"--steps {args.steps} are too few for {layers} layers and a last phase")
    for number in range(1, layers + 1) if args.share else ():
        train = partial(train_layer, number=number)
        args.student = str(run_phase(args, f"layer{number}", train, steps=steps))
    args.steps -= steps * layers
    run, data = Run(args), open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids)
        loss, parts = compute_loss(student_logits, teacher_logits, labels, args.alpha)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
