"""Stage 3: distill by reasoning. The student learns to write the steps, then the answer.

    loss = sum_s w(s) * CE(s) / sum_s w(s)         w: 0 on the prompt, 10 on the four tags, 1 else

    <think>
     Ann has 12 pens: Ann=12
     Ann, Ben has 5 more pens: Ben=12+5=17
     Ben, Cal has 3 times as many pens: Cal=17*3=51
    </think>
    <answer>
    51
    </answer>

A small model cannot compute 51 in one token, but it can write the way there. Whose words it learns
from is the data's matter: gold traces, or those that a teacher wrote (dataset.make_traces).

    python train_distill_reason.py                                       # gold traces
    python train_distill_reason.py --student out/teacher --out out/reason_teacher
    python -m dataset.make_traces --teacher out/reason_teacher           # out/traces.jsonl
    python train_distill_reason.py --data out/traces.jsonl --out out/from_teacher
    python train_distill_reason.py --teacher out/reason_teacher --out out/reason_kl

With --teacher the loss is alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), both with the
weights w. Without one this is how a reasoning teacher is made. See what came out with
python -m eval.reasoning. Shapes: B batch, S sequence, V vocabulary, N tokens with a weight.
"""

from pathlib import Path

import torch
from torch import Tensor

from dataset.chat import ChatData, parts_of
from dataset.tokenizer import TAGS, load_tokenizer, special_id, tokenizer_hash
from distill import HiddenTeacher, fused_mixed_loss, reasoning_weights
from eval.metrics import evaluate
from model import load_model, make_or_load, save_model
from run import (
    Ahead,
    Optimizer,
    Run,
    autocast,
    command_line,
    microbatches,
    place,
    places_in_use,
    settle_speed,
    setup,
)
from run.flags import add_common_flags, new_parser

EVAL = 128  # held-out conversations of the evaluations during training


def compute_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher,
    labels: Tensor,
    weights: Tensor,
    temperature: float,
    alpha: float,
    compiled: bool = False,
) -> Tensor:
    """Weighted cross-entropy, mixed with the KL where there is a teacher; a scalar.

    student_hidden (N, D), student_head (V, D), labels and weights (N,). Without a teacher it is
    weighted_cross_entropy(logits, labels, weights) of distill/reasoning.py, in chunks.
    """
    alpha = 1.0 if teacher is None else alpha
    return fused_mixed_loss(
        student_hidden,
        student_head,
        teacher,
        labels,
        weights,
        temperature,
        alpha,
        compiled=compiled,
    )


def parse_args(argv=None):
    parser = new_parser(__doc__)
    group = parser.add_argument_group("reasoning")
    group.add_argument(
        "--student", default="out/student", help="checkpoint folder, or preset (nano, micro, ...)"
    )
    group.add_argument(
        "--data", default="out/data/reason_train.jsonl", help="jsonl of conversations with traces"
    )
    group.add_argument(
        "--tokenizer", default="out/data", help="folder of the tokenizer for a preset"
    )
    group.add_argument("--tag_weight", type=float, default=10.0, help="of the four tags, 0 on")
    group.add_argument("--think_weight", type=float, default=1.0, help="inside <think>, 0 on")
    group.add_argument("--answer_weight", type=float, default=1.0, help="inside <answer>, 0 on")
    group.add_argument(
        "--answers_only", action="store_true", help="drop the <think> spans: what traces are worth"
    )
    group.add_argument("--teacher", default=None, help="checkpoint folder; adds the KL")
    group.add_argument("--alpha", type=float, default=0.5, help="with --teacher: 0 (KL) to 1 (CE)")
    group.add_argument(
        "--temperature", type=float, default=1.0, help="with --teacher: T, 0.001 to 1000"
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out bad lines of a jsonl, and count them"
    )
    add_common_flags(
        parser,
        out="out/reasoner",
        steps=1000,
        batch_size=32,
        seq_len=384,
        learning_rate=0.006,
        final_eval=1000,
    )
    return parser.parse_args(argv)


def open_models(args, device):
    """Student, teacher (or None), and the folder of the tokenizer that both must share."""
    folder = args.student if Path(args.student).is_dir() else args.tokenizer
    if args.student == "out/student" and folder != args.student:
        raise ValueError(
            "no student in 'out/student': make one with: python train_distillation.py, or start "
            "from a preset: --student nano"
        )
    student = make_or_load(args.student, load_tokenizer(folder).get_vocab_size())
    student = place(student, device, args)
    if args.teacher is None or args.alpha == 1:
        return student, None, folder
    teacher = place(load_model(args.teacher).requires_grad_(False), device, args)
    if tokenizer_hash(args.teacher) != tokenizer_hash(folder):
        raise ValueError(
            f"the tokenizer of teacher {args.teacher} is not the one of {folder}: both must use "
            "one tokenizer; re-train one of them on the other's data"
        )
    return student, teacher, folder


def main(args) -> dict:
    # 1. Setup: flags, seed, device, precision.
    device = setup(args)
    # 2. Models first: the student's folder says which tokenizer reads the data.
    student, teacher, tokenizer_folder = open_models(args, device)
    settle_speed(args, device, student, teacher)
    student_body = torch.compile(student.model, dynamic=True) if args.compile else student.model
    # 3. Data: a conversation's labels are the assistant's words only.
    tokenizer = load_tokenizer(tokenizer_folder)
    data, held_out = (
        ChatData(
            args.data,
            tokenizer,
            split,
            args.seq_len,
            answers_only=args.answers_only,
            skip_bad=args.skip_bad,
        )
        for split in ("train", "val")
    )
    parts = parts_of(args.batch_size, args.accumulation_steps)
    print(
        f"{args.data}: {data.size} conversations, {data.cut} cut to {args.seq_len} tokens, "
        f"{data.padding_share(args.batch_size, parts):.1%} padding"
    )
    tag_ids = tuple(special_id(tokenizer, tag) for tag in TAGS)
    end_of_turn = special_id(tokenizer, "<|im_end|>")

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        input_ids, labels = data.batch(step, args.batch_size, args.seed)
        weights = reasoning_weights(
            labels, args.tag_weight, args.think_weight, args.answer_weight, tag_ids, end_of_turn
        )
        return input_ids, labels, weights

    batch_of = Ahead(batch, args.steps, device)
    # 4. Optimizer.
    optimizer = Optimizer(student, args)
    # 5. Resume, if asked to.
    run = Run(
        args, student, optimizer, device, lambda out: save_model(student, out, tokenizer_folder)
    )
    # 6. Train.
    for step in run.steps():
        input_ids, labels, weights = batch_of(step)  # (B, S) each
        loss = torch.zeros((), device=device)
        for ids, targets, weight, share in microbatches(
            (input_ids, labels, weights), weights, parts
        ):
            # Losses only where a token weighs: two thirds of the positions are the prompt's.
            chosen = places_in_use(weight)  # (N,), on the CPU: no GPU is waited for
            ids, chosen, targets, weight = (
                tensor.to(device, non_blocking=True)
                for tensor in (ids, chosen, targets.flatten()[chosen], weight.flatten()[chosen])
            )
            with autocast(device, args.dtype):
                student_hidden = student_body(ids, keep=chosen)  # (N, D)
                teacher_says = None
                if teacher is not None:
                    with torch.no_grad(), autocast(device, args.teacher_dtype):
                        teacher_hidden = teacher.model(ids, keep=chosen)
                        teacher_says = HiddenTeacher(teacher_hidden, teacher.lm_head.weight)
                part = share * compute_loss(
                    student_hidden,
                    student.lm_head.weight,
                    teacher_says,
                    targets,
                    weight,
                    args.temperature,
                    args.alpha,
                    args.compile,
                )
            part.backward()
            loss += part.detach()
        if run.update(loss, int((labels != -100).sum()), input_ids):
            batches = held_out.evaluation_batches(args.batch_size, EVAL)
            run.evaluated(evaluate(student, batches)["val_loss"])
    # 7. Evaluate on more of what is held out, and save.
    batches = held_out.evaluation_batches(args.batch_size, args.final_eval)
    metrics = evaluate(student, batches, teacher=teacher)
    return run.finish(student.config.to_json(), metrics)


if __name__ == "__main__":
    command_line(main, parse_args())
