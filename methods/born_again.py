"""Born-again networks: students of one size, each generation taught by the one before it.

    loss of generation g = alpha * CE + (1 - alpha) * T^2 * KL(generation g-1 || generation g)
    generation 0         = CE alone, or taught by --teacher
    together             p(v) = 1/G sum_g p_g(v), the mean of all generations' probabilities

A teacher no larger than its student can teach too: its distribution is a smoother target than a
label, and its mistakes are not those of new weights (BAN, Furlanello et al. 2018, 1805.04770).

    KL points to the later generation; no gradient reaches the earlier one.
    Means are over the labels that are not -100. Each generation has weights and an order of
    batches of its own, as in the paper; the last one's are those of --seed.
    Charged: all trainings (run.json: "phases"); `together` costs a pass per generation to use.
    Traps: G trainings are to be compared with one of G times the steps, and `together` with as many
    plain students together, for most of an ensemble's gain needs no teaching.

    python -m methods.born_again                             # three trainings: three minutes
    python -m methods.born_again --teacher out/teacher --generations 1

Judged on few: success is 0.02 nats below a plain student of the cost of all, over 3 seeds.
Try: --generations 4 (when does it stop helping?); --alpha 0 (labels in generation 0 alone).
Shapes: B batch, S sequence, V vocabulary, G generations.
"""

from pathlib import Path

import torch

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from model import layers_named, load_model
from run import Run, add_common_flags, command_line, loss_together, new_parser, run_phase

RANGES = {"generations": (1, 100)}


def compute_loss(student_logits, teacher_logits, labels, T: float, alpha: float):
    """The loss of a generation, a scalar, and its parts: logits (B, S, V), labels (B, S). Without
    teacher_logits it is CE."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    if teacher_logits is None:
        return ce, {"ce": ce}
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, T), valid)
    return alpha * ce + (1 - alpha) * T**2 * kl, {"ce": ce, "kl": kl}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--generations", type=int, default=2, help="that are taught by the one before")
    add("--temperature", type=float, default=1.0, help="T")
    add("--alpha", type=float, default=0.5, help="0: the earlier generation; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/born_again", pair=True, fused=False, teacher=None)
    return parser.parse_args(argv)


def train(args, earlier: tuple[Path, ...] = ()) -> dict:
    """One generation, taught by args.teacher, if any; measured together with earlier ones."""
    run, data = Run(args), open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher, data) if args.teacher else None
    student = run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids) if teacher else None
        knobs = (args.temperature, args.alpha)
        loss, parts = compute_loss(student_logits, teacher_logits, labels, *knobs)
        run.step(loss, **parts)
    if not earlier:
        return run.finish()
    models = [student, *(load_model(folder, run.device) for folder in earlier)]
    held_out = data.held_out.evaluation(args.batch_size, args.final_eval)
    return run.finish(together_loss=lambda: loss_together(models, held_out))


def main(args) -> dict:
    check_ranges(args, **RANGES)
    if layers_named(args.student):
        cure = "pass a preset, or make a folder with train_distillation.py --student layers:N"
        raise ValueError(f"--student {args.student} would copy the generation before it: {cure}")
    folders = []
    for number in range(args.generations):
        seed = args.seed + 1000 * (args.generations - number)  # the last one's is --seed
        folders.append(run_phase(args, f"generation{number}", train, seed=seed))
        args.teacher = str(folders[-1])
    return train(args, tuple(folders))


if __name__ == "__main__":
    command_line(main, parse_args())
