"""Shape search: a dozen shapes of one size, and which cheap ranking of them foretells the last one.

    tau = (pairs in the same order - pairs in opposite orders) / (n (n - 1) / 2)      Kendall 1938
    loss = alpha * CE + (1 - alpha) * KL(teacher || student)

Deep and narrow or shallow and wide? All shapes have as many parameters as the preset --student,
within 2%. Each is trained three times from one seed: --short steps on the text, --short with the
teacher, --steps with it. tau tells how a short ranking agrees with the last one: 1 for the same
order, by chance 0 +- sqrt(2 (2n + 5) / (9n (n - 1))), 0.22 for n = 12. Depth is a ranking for free.
The best short one with the teacher is in --out, all in shapes.json (DNA, 1911.13053; AdaBERT,
2001.04246). Means are over labels that are not -100; no gradient reaches the teacher. Traps: equal
sizes told as equal costs; the winner told alone; an order of losses closer than two seeds'.
Charged: all runs, with the teacher's passes where it is heard.

    python -m methods.shape_search                            # about 10 minutes on a core

Judged on few: success is tau above 0.44 (chance + 2 deviations) with the teacher, above all others.
Try: --shapes 6 --short 20; --short 10; --student micro (less of it is embedding).
Shapes: B batch, S sequence, V vocabulary, n shapes.
"""

import torch

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import Finished, check_ranges, read_json, write_json
from model import PRESETS, ModelConfig
from model.shapes import kendall_tau, shapes_of_size
from run import Run, add_common_flags, command_line, new_parser, run_phase, val_loss

RANGES = {"shapes": (2, 50), "short": (1, 10**9)}


def compute_loss(student_logits, teacher_logits, labels, alpha: float):
    """The loss and its parts: logits (B, S, V), the teacher's None if alpha is 1; labels (B, S)."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    if teacher_logits is None:
        return ce, {"ce": ce}
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, 1.0), valid)
    return alpha * ce + (1 - alpha) * kl, {"ce": ce, "kl": kl}


def train(args) -> dict:
    run, data = Run(args), open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher, data) if args.alpha < 1 else None
    student = run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids) if teacher else None
        loss, parts = compute_loss(student_logits, teacher_logits, labels, args.alpha)
        run.step(loss, **parts)
    return run.finish()


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--shapes", type=int, default=12, help="how many, from shallow to deep")
    add("--short", type=int, default=40, help="steps of the two short runs of each shape")
    add("--alpha", type=float, default=0.5, help="with the teacher: 0: teacher; 1: labels")
    add_data_flags(parser)
    few = {"steps": 200, "warmup": 10, "final_eval": 200}
    add_common_flags(parser, out="out/shape_search", pair=True, fused=False, **few)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    V = open_data(args, args.teacher).vocab_size
    shapes = shapes_of_size(args.shapes, ModelConfig.preset(args.student, V))
    PRESETS.update(shapes)  # run.student makes a model by the name of its preset
    table = {name: {"layers": shapes[name][1]} for name in shapes}
    for name, row in table.items():
        short = {"student": name, "steps": args.short}
        row["text"] = val_loss(run_phase(args, f"{name}-text", train, **short, alpha=1.0))
        row["teacher"] = val_loss(run_phase(args, f"{name}-teacher", train, **short))
    chosen = min(table, key=lambda name: table[name]["teacher"])
    for name in (name for name in table if name != chosen):
        table[name]["last"] = val_loss(run_phase(args, f"{name}-last", train, student=name))
    args.student = chosen
    try:
        train(args)
    except Finished as reason:
        print(reason)
    table[chosen]["last"] = val_loss(args.out)
    columns = {key: [row[key] for row in table.values()] for key in table[chosen]}
    tau = {key: kendall_tau(columns[key], columns["last"]) for key in ("text", "teacher", "layers")}
    for name, row in table.items():
        print(f"{name:8}", *(f"{key} {value:.4g}" for key, value in row.items()))
    print("tau with the last ranking:", *(f"{key} {value:+.2f}" for key, value in tau.items()))
    write_json(args.out / "shapes.json", {"chosen": chosen, "tau": tau, "shapes": table})
    return read_json(args.out / "run.json")


if __name__ == "__main__":
    command_line(main, parse_args())
