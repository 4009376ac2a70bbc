"""Lesson 3: distill by reasoning. The student learns to write the steps, then the answer.

    loss = sum_s w(s) * CE(s) / sum_s w(s)      w: 0 on the prompt, --tag_weight on the tags, else 1

    <think>
     Ann has 12 pens: Ann=12
     Ann, Ben has 5 more pens: Ben=12+5=17
     Ben, Cal has 3 times as many pens: Cal=17*3=51
    </think>
    <answer>
    51
    </answer>

A small model cannot compute 51 in one token, but it can write the way there. The data decides whose
words it learns: gold traces, or those that a teacher wrote (dataset.make_traces). With --teacher
the loss is alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), both with the weights w.

    Both means divide by sum(w), not by the number of tokens, so that the size of the loss does not
    follow how many tags a batch holds. Logits are computed only where a label is.
    Costs a forward pass of the teacher per batch, with --teacher; the traces cost sampling before.

    python train_distill_reason.py --tag_weight 10                       # gold traces, tags x 10
    python train_distill_reason.py --out out/even                        # every word alike: better
    python train_distill_reason.py --student out/teacher --out out/reason_teacher
    python -m dataset.make_traces --teacher out/reason_teacher           # out/traces.jsonl
    python train_distill_reason.py --data out/traces.jsonl --out out/from_teacher
    python train_distill_reason.py --teacher out/reason_teacher --out out/reason_kl
    python -m eval.reasoning --model out/reasoner                        # see what came out

MiniMind gives the four tags ten times the weight, so that the form is learned first. Here the form
is right within a few hundred steps anyway, and the weight is missing where the problem is solved,
so the default is 1.

Try: --tag_weight 3, --answers_only (what are the steps worth?).
Shapes: B batch, S sequence, N tokens with a label, V vocabulary.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import at_least_float32, fused_loss, kl_divergence, reasoning_weights, use_fused
from run import Run, add_common_flags, add_teacher_dtype, command_line, new_parser


def compute_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, weights: Tensor,
    temperature: float = 1.0, alpha: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """alpha * CE + (1 - alpha) * T^2 * KL, weighted means over tokens, a scalar; and its parts.

    student_logits, teacher_logits (N, V); labels, weights (N,). At alpha = 1 there is no teacher.
    """
    student_logits, counts = at_least_float32(student_logits), weights > 0
    total = weights.sum().clamp(min=1e-9)
    loss, parts = 0.0, {}
    if alpha > 0:  # the words of the trace
        log_probs = student_logits.log_softmax(-1)
        chosen = log_probs.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)  # (N,)
        parts["ce"] = -torch.where(counts, weights * chosen, 0.0).sum() / total
        loss = loss + alpha * parts["ce"]
    if alpha < 1:  # the teacher's guess at every word, as in lesson 2
        kl = kl_divergence(student_logits, teacher_logits, temperature)  # (N,)
        parts["kl"] = torch.where(counts, weights * kl, 0.0).sum() / total
        loss = loss + (1 - alpha) * temperature**2 * parts["kl"]
    return loss, parts


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--student", default="out/student", help="folder, preset or layers:N")
    parser.add_argument("--tag_weight", type=float, default=1.0, help="of the four tags")
    parser.add_argument("--think_weight", type=float, default=1.0, help="inside <think>")
    parser.add_argument("--answer_weight", type=float, default=1.0, help="inside <answer>")
    parser.add_argument("--answers_only", action="store_true", help="drop the <think> spans")
    parser.add_argument("--teacher", default=None, help="checkpoint folder; adds the KL")
    add_teacher_dtype(parser)
    parser.add_argument("--alpha", type=float, default=0.5, help="with --teacher: 0: KL; 1: CE")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --teacher: T")
    add_data_flags(parser, data="out/data/reason_train.jsonl")
    add_common_flags(
        parser, out="out/reasoner", batch_size=32, seq_len=384, learning_rate=0.006, final_eval=1000
    )
    return parser.parse_args(argv)


def main(args) -> dict:
    run = Run(args)  # device, precision, seed
    data = open_data(args, args.student)
    special_ids = data.special_ids()  # of the four tags, and of the end of a turn
    alpha = args.alpha if args.teacher else 1.0
    student = run.student(args.student, data)
    teacher = run.teacher(args.teacher, data) if alpha < 1 else None  # frozen
    spans = (args.tag_weight, args.think_weight, args.answer_weight)
    fused = use_fused(args.fused, args.batch_size * args.seq_len, data.vocab_size)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        chosen = labels != -100  # (B, S): two thirds of the positions are the prompt's
        weights = reasoning_weights(labels, *spans, *special_ids)[chosen]  # (N,)
        with run.precision():
            hidden = student.model(input_ids)[chosen]  # (N, D)
            teacher_hidden = teacher.model(input_ids)[chosen] if teacher else None
            if fused:  # the same value, without the (N, V) logits
                guess = (teacher_hidden, teacher.lm_head.weight) if teacher else None
                loss, parts = fused_loss(
                    compute_loss, (hidden, student.lm_head.weight), guess, labels[chosen], weights,
                    args.temperature, alpha, weight=weights, compiled=args.compile,
                )  # fmt: skip
            else:
                teacher_logits = teacher.lm_head(teacher_hidden) if teacher else None
                loss, parts = compute_loss(
                    student.lm_head(hidden), teacher_logits, labels[chosen], weights,
                    args.temperature, alpha,
                )  # fmt: skip
        run.step(loss, weight=weights.sum(), **parts)  # a mean over the sum of the weights
    return run.finish()  # evaluate, save


if __name__ == "__main__":
    command_line(main, parse_args())
