"""Quantisation with a teacher: a model on a coarse grid learns to say what it said before.

    w^ = s * clip( round(w / s), -2^(b-1), 2^(b-1) - 1 )            s: one step per output channel
    loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student with w^)

Rounding alone (--rounded_only, post-training quantisation) costs nothing at 8 bits, much at 2. Here
the full weights w go on learning, but every forward pass sees w^, and the gradient passes through
the rounding as if it were not there (LLM-QAT, 2305.17888; BitDistiller, 2402.10631; NVIDIA's QAD,
2601.20088). The teacher is the same model before quantisation, or --teacher.

KL points from the teacher to the student; no gradient reaches the teacher, nor a weight beyond the
clip; means are over labels that are not -100. Traps: a teacher that shares the quantised layers
teaches nothing, its KL is 0; one step for a whole matrix is too coarse. Embedding, head and norms
stay in float32 unless --embeddings (norms always); activations are never rounded. --bits 16 is
the plain method. --out holds w^ in float32 for every tool, quantized.safetensors the packed levels.
Charged: the teacher's forward pass; rounding, twice a step, is in the seconds alone.

    python -m methods.quantize                                  # out/teacher to 4 bits, by itself
    python -m methods.quantize --bits 2 --out out/two_bits
    python -m methods.quantize --bits 2 --rounded_only --out out/two_bits_rounded

Judged on few: success at 2 bits is half of rounding's loss undone, and 0.02 nats below CE.
Try: --alpha 1 --data_share 0.1 (CE on little text), --embeddings (is the head harder to round?).
Shapes: B batch, S sequence, V vocabulary, b bits.
"""

import copy

import torch
from torch.func import functional_call

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence
from files import check_ranges
from model.quantize import FULL, quantized_weights, save_quantized
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"bits": (2, FULL)}


def compute_loss(student_logits, teacher_logits, labels, temperature: float, alpha: float):
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, and its two parts.
    student_logits, teacher_logits (B, S, V); labels (B, S), -100 is ignored."""
    valid, parts, loss = labels != -100, {}, 0.0
    N = valid.sum().clamp(min=1)
    if alpha > 0:
        parts["ce"] = cross_entropy(student_logits, labels)[valid].sum() / N
        loss = loss + alpha * parts["ce"]
    if alpha < 1:
        kl = kl_divergence(student_logits, teacher_logits, temperature)  # (B, S)
        parts["kl"] = kl[valid].sum() / N
        loss = loss + (1 - alpha) * temperature**2 * parts["kl"]
    return loss, parts


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--bits", type=int, default=4, help="of a weight, 2 to 8; 16: nothing is rounded")
    add("--rounded_only", action="store_true", help="no step: round the weights as they are")
    add("--embeddings", action="store_true", help="quantise embedding and head too")
    add("--temperature", type=float, default=1.0, help="T")
    add("--alpha", type=float, default=0.0, help="0: the teacher; 1: the labels")
    add_data_flags(parser)
    pair = {"student": "out/teacher", "teacher": None}  # None: the student before quantisation
    add_common_flags(parser, out="out/quantized", pair=True, fused=False, steps=200, **pair)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    if args.fsdp:
        raise ValueError("--fsdp cuts the rows that a scale is of: leave it out")
    run, T, alpha = Run(args), args.temperature, args.alpha
    data = open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher or args.student, data)  # a model of its own
    rounded = run.student(args.student, data)  # w^: this one is evaluated and saved
    student = run.to_device(copy.deepcopy(rounded))  # w: learns
    how = (args.bits, args.embeddings)
    run.optimize(student, rounded.requires_grad_(False))
    rounded.load_state_dict(quantized_weights(student, *how), strict=False)
    if args.rounded_only:
        args.steps, args.flops, args.seconds = 0, None, None
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            weights = quantized_weights(student, *how)  # w^, with gradients to w
            student_logits = functional_call(student, weights, (input_ids,))  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids) if alpha < 1 else None
        loss, parts = compute_loss(student_logits, teacher_logits, labels, T, alpha)
        if run.step(loss, **parts):
            rounded.load_state_dict(quantized_weights(student, *how), strict=False)
    size = save_quantized(student, args.out, *how)
    print(f"{args.out}/quantized.safetensors: {size / 1e6:.2f} MB")
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
