"""LoRA distillation: a pretrained student learns a new field from a teacher by a small adapter.

    y = W x + (lora_alpha / r) * B A x              W is frozen, A (r, in) and B (out, r) learn
    loss = alpha * CE + (1 - alpha) * KL(teacher || student)

A base learns text (not where --student is a folder), the teacher the field by CE and an adapter of
its own (not at --teacher_steps 0), then the student learns it from that teacher (LoRA, 2106.09685;
KD-LoRA, 2410.20777). --rank 0 is the plain method: all weights learn. --transplant starts from the
teacher's adapter: copied, where both have one base, or projected (model/lora_transfer.py).

KL points from the teacher to the student; no gradient reaches the teacher, nor W; means are over
labels that are not -100. Traps: a merge without lora_alpha / r; A = B = 0 never learn; a tag that
the base never saw keeps its random row, as embeddings are frozen.
Charged: all phases, the teacher's passes. A student's step is a quarter cheaper than at rank 0.

    python -m methods.lora                # word problems; takes about three minutes
    python -m methods.lora --data out/data --data_share 0.1 --teacher_steps 0 --out out/lora_text

Judged on few: success is within 0.02 nats of rank 0 at equal steps, with a tenth of the weights.
Try: --rank 1 (how little is enough?), --student out/teacher --transplant copy (nothing to learn?).
Shapes: B batch, S sequence, V vocabulary, r rank.
"""

import copy

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from model import PRESETS, layers_named
from model.lora import add_lora, load_adapted, merged_weights, save_lora
from model.lora_transfer import TRANSPLANTS
from run import Run, add_common_flags, command_line, new_parser, run_phase

RANGES = {"rank": (0, 2**20), "lora_alpha": (1e-3, 1e6), "teacher_steps": (0, 10**9)}


def compute_loss(student_logits, teacher_logits, labels, alpha: float):
    """alpha * CE + (1 - alpha) * KL, a scalar, and its parts; logits (B, S, V), labels (B, S)."""
    valid, parts = labels != -100, {}
    if alpha > 0:
        parts["ce"] = weighted_mean(cross_entropy(student_logits, labels), valid)
    if alpha < 1:
        parts["kl"] = weighted_mean(kl_divergence(student_logits, teacher_logits, 1.0), valid)
    return alpha * parts.get("ce", 0.0) + (1 - alpha) * parts.get("kl", 0.0), parts


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--rank", type=int, default=8, help="r; 0: no adapter, all weights learn")
    add("--lora_alpha", type=float, default=16.0, help="the adapter counts lora_alpha / r")
    add("--transplant", choices=("none", *TRANSPLANTS), default="none", help="first A and B")
    add("--teacher_steps", type=int, default=200, help="of its adapter; 0: it knows the field")
    add("--alpha", type=float, default=0.5, help="0: the teacher; 1: the labels")
    add_data_flags(parser, data="out/data/reason_train.jsonl")
    add_common_flags(parser, out="out/lora", pair=True, fused=False, steps=200, seq_len=256)
    return parser.parse_args(argv)


def train(args) -> dict:
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher, data) if args.alpha < 1 else None
    merged = student = run.student(args.student, data)  # this one is evaluated and saved
    if args.rank:
        student = copy.deepcopy(merged)  # computes the same from W, A and B
        adapter = add_lora(student, args.rank, args.lora_alpha)
        if args.transplant != "none":
            source, ids = load_adapted(args.teacher, run.device), data.batch(0, 64, args.seed)[0]
            TRANSPLANTS[args.transplant](source, student, ids.to(run.device))
            merged.load_state_dict(merged_weights(student), strict=False)
        run.to_device(student)
    run.optimize(*((adapter, merged.requires_grad_(False)) if args.rank else (student,)))
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            teacher_logits = teacher(input_ids) if teacher else None  # frozen: no gradients
        loss, parts = compute_loss(student_logits, teacher_logits, labels, args.alpha)
        if run.step(loss, **parts):
            merged.load_state_dict(merged_weights(student), strict=False)
    save_lora(student, args.out / "adapter", args.student)
    return run.finish()


def main(args) -> dict:
    check_ranges(args, **RANGES)
    if args.fsdp and args.rank:
        raise ValueError("--fsdp cuts the matrices that adapters are merged into: leave it out")
    if args.student in PRESETS or layers_named(args.student):  # a base on the text of the field
        text = args.tokenizer if str(args.data).endswith(".jsonl") else args.data
        args.student = str(run_phase(args, "base", train, data=text, rank=0, alpha=1.0))
    if steps := args.teacher_steps:
        own = {"student": args.teacher, "steps": steps, "alpha": 1.0, "transplant": "none"}
        args.teacher = str(run_phase(args, "teacher", train, **own))
    return train(args)


if __name__ == "__main__":
    command_line(main, parse_args())
