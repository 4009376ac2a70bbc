"""Stage 2: distill by logits. The student learns from the text and from the teacher's whole guess.

    loss = alpha * CE + (1 - alpha) * T^2 * KL( softmax(teacher / T) || softmax(student / T) )

A label names one next token; the teacher's distribution says how likely every token was. At each
position the student is told V numbers instead of one, so it learns more from the same text.

    python train_pretrain.py                                   # once: the teacher, out/teacher
    python train_distillation.py                               # out/student, T = 1, alpha = 0.5
    python train_distillation.py --temperature 4 --alpha 0 --out out/soft
    python -m dataset.cache_teacher                            # pays the teacher for many students
    python train_distillation.py --teacher_cache out/teacher/sample.cache --seed 1 --out out/other
    python train_distillation.py --data chats.jsonl --student out/student --out out/chat

alpha = 1 is plain training and never runs the teacher; alpha = 0 never reads the labels. --data is
a folder made by dataset.prepare, or a jsonl of conversations, of which only the assistant's turns
count. Next: train_distill_reason.py. Shapes: B batch, S sequence, V vocabulary, D width.
"""

from pathlib import Path

import torch
from torch import Tensor

from dataset.cache_file import TeacherCache
from dataset.chat import ChatData, parts_of
from dataset.packing import PackedText
from dataset.tokenizer import load_tokenizer, tokenizer_hash
from distill import HiddenTeacher, fused_mixed_loss
from eval.metrics import evaluate
from model import load_model, make_or_load, read_config, save_model
from run import (
    Ahead,
    Optimizer,
    Run,
    autocast,
    command_line,
    microbatches,
    place,
    settle_speed,
    setup,
)
from run.flags import add_common_flags, new_parser

EVAL = 100  # held-out windows or conversations of the evaluations during training


def compute_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher,
    labels: Tensor,
    temperature: float,
    alpha: float,
    compiled: bool = False,
) -> Tensor:
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar; both halves are means over labels not -100.

    student_hidden (B, S, D), student_head (V, D), labels (B, S); teacher: what it says about the
    same tokens. The value of mixed_loss(student_logits, teacher_logits, ...) in distill/logits.py,
    where the formula stands in six lines; distill/fused.py never holds all of the logits at once.
    """
    mask = labels != -100
    return fused_mixed_loss(
        student_hidden, student_head, teacher, labels, mask, temperature, alpha, compiled=compiled
    )


def parse_args(argv=None):
    parser = new_parser(__doc__)
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", default="out/teacher", help="checkpoint folder")
    group.add_argument(
        "--student", default="nano", help="preset (nano, micro, mini, ...) or checkpoint folder"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="T, 0.001 to 1000; above 1 is softer"
    )
    group.add_argument(
        "--alpha", type=float, default=0.5, help="0 (only the teacher) to 1 (only the labels)"
    )
    group.add_argument(
        "--teacher_cache",
        default=None,
        help="file of the teacher's output (python -m dataset.cache_teacher): it is not run again",
    )
    group.add_argument(
        "--data", default="out/data", help="folder made by dataset.prepare, or a chat jsonl"
    )
    group.add_argument(
        "--data_share", type=float, default=1.0, help="first part of the text to use, above 0 to 1"
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out bad lines of a jsonl, and count them"
    )
    add_common_flags(parser, out="out/student", final_eval=400)
    return parser.parse_args(argv)


def open_data(args):
    """Training and held-out data of --data, both with the teacher's tokenizer."""
    if str(args.data).endswith(".jsonl"):
        if args.data_share != 1.0 or args.teacher_cache:
            raise ValueError("--data_share and --teacher_cache need --data to be a prepared folder")
        tokenizer = load_tokenizer(args.teacher)
        train, held_out = (
            ChatData(args.data, tokenizer, split, args.seq_len, skip_bad=args.skip_bad)
            for split in ("train", "val")
        )
        parts = parts_of(args.batch_size, args.accumulation_steps)
        print(
            f"{args.data}: {train.size} conversations, {train.cut} cut to {args.seq_len} "
            f"tokens, {train.padding_share(args.batch_size, parts):.1%} padding"
        )
        return train, held_out
    text = PackedText(args.data, "train", args.seq_len, args.data_share)
    if args.alpha < 1 and tokenizer_hash(args.teacher) != text.meta["tokenizer_sha256"]:
        raise ValueError(
            f"the tokenizer of teacher {args.teacher} (vocabulary "
            f"{read_config(args.teacher).vocab_size}) is not the one of {args.data} (vocabulary "
            f"{text.vocab_size}): both must use one tokenizer; re-train the teacher on this data, "
            "or prepare the data with the teacher's tokenizer: python -m dataset.prepare "
            f"--tokenizer {args.teacher}"
        )
    return text, PackedText(args.data, "val", args.seq_len)


def main(args) -> dict:
    # 1. Setup: flags, seed, device, precision.
    device = setup(args)
    needs_teacher = args.alpha < 1
    if needs_teacher and not Path(args.teacher).is_dir():
        raise ValueError(
            f"no teacher in '{args.teacher}': make one with: python train_pretrain.py "
            f"--out {args.teacher}"
        )
    # 2. Data: windows of a token stream, or conversations padded to their batch.
    data, held_out = open_data(args)
    packed = isinstance(data, PackedText)
    parts = args.accumulation_steps  # windows of a stream have one length, conversations not
    if not packed:
        parts = parts_of(args.batch_size, parts)
    # 3. Models: the teacher is fixed, the student learns.
    teacher = None
    if needs_teacher:
        teacher = place(load_model(args.teacher).requires_grad_(False), device, args)
    if packed and not needs_teacher:
        vocab_size = data.vocab_size
    else:
        vocab_size = read_config(args.teacher).vocab_size
    student = place(make_or_load(args.student, vocab_size), device, args)
    cache = None
    if args.teacher_cache and needs_teacher:
        head = teacher.lm_head.weight
        cache = TeacherCache(args.teacher_cache, args.teacher, data, args.temperature, head)
    settle_speed(args, device, student, None if cache else teacher)
    student_body = torch.compile(student.model) if args.compile else student.model
    teacher_body = teacher.model if needs_teacher else None
    if args.compile and needs_teacher:
        teacher_body = torch.compile(teacher.model)

    def batch(step: int) -> tuple[Tensor, ...]:
        """input_ids and labels (B, S), and with a cache what the teacher said about them."""
        tensors = data.batch(step, args.batch_size, args.seed)
        if cache is None:
            return tensors
        return *tensors, *cache.take(data.window_ids(step, args.batch_size, args.seed))

    batch_of = Ahead(batch, args.steps, device)
    # 4. Optimizer.
    optimizer = Optimizer(student, args)
    # 5. Resume, if asked to.
    tokenizer_folder = args.data if packed else args.teacher
    run = Run(
        args, student, optimizer, device, lambda out: save_model(student, out, tokenizer_folder)
    )
    # 6. Train.
    for step in run.steps():
        tensors = batch_of(step)
        input_ids, labels = tensors[:2]
        loss = torch.zeros((), device=device)
        for ids, targets, *cached, share in microbatches(tensors, (labels != -100).float(), parts):
            ids, targets, *cached = (
                tensor.to(device, non_blocking=True) for tensor in (ids, targets, *cached)
            )
            with autocast(device, args.dtype):
                student_hidden = student_body(ids)  # (B, S, D)
                teacher_says = None
                if cached:
                    teacher_says = cache.teacher(*cached)
                elif needs_teacher:
                    with torch.no_grad(), autocast(device, args.teacher_dtype):
                        teacher_says = HiddenTeacher(teacher_body(ids), teacher.lm_head.weight)
                part = share * compute_loss(
                    student_hidden,
                    student.lm_head.weight,
                    teacher_says,
                    targets,
                    args.temperature,
                    args.alpha,
                    args.compile,
                )
            part.backward()
            loss += part.detach()
        if run.update(loss, int((labels != -100).sum()), input_ids):
            batches = held_out.evaluation_batches(args.batch_size, EVAL)
            run.evaluated(evaluate(student, batches)["val_loss"])
    # 7. Evaluate on more of what is held out, beside the teacher, and save.
    bytes_per_token = held_out.bytes_per_token if packed else None
    batches = held_out.evaluation_batches(args.batch_size, args.final_eval)
    metrics = evaluate(student, batches, bytes_per_token, teacher)
    return run.finish(student.config.to_json(), metrics)


if __name__ == "__main__":
    command_line(main, parse_args())
