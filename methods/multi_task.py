"""Multi-task: one student learns text from a teacher and word problems from their traces, at once.

    loss = sum_n w_n l_n / sum_n w_n   over the valid tokens n of both tasks

    text       w = 1,                  l = alpha CE + (1 - alpha) KL(teacher || student)
    problems   w = --problem_weight,   l = CE

Of a batch's rows --problem_share are problems (a prepared folder has some), the others text, which
alone the teacher has read and is asked about. Many tasks in one student: 1904.09482.

    KL points from the teacher to the student; no gradient reaches the teacher.
    The mean is over the tokens of both, by weight; the log's text and problems add up to the loss.
    Traps: one mean per task, summed, is another loss when batches are cut; rows are not tokens: a
    problem has 73 labels on average, a row of text 256. val_loss is that of the text.
    Charged: the teacher's pass over rows of text, the student's over all, padding too.

    python -m methods.multi_task && python -m eval.reasoning --model out/multi_task

Judged on few: success is at most 0.05 nats, and 5 points of answers, lost against one task alone.
Try: --problem_weight 3, --problem_share 0.25 (but --seq_len 128 would cut most problems short).
Shapes: B batch (B_text rows of text), S sequence, N valid tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import ChatData, PackedText
from distill import cross_entropy, kl_divergence
from files import check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"problem_share": (0.0, 1.0), "problem_weight": (0.0, 1e6)}


class TextAndProblems(PackedText):
    """Packed text, with rows of problems in every batch: (B,) says which, after ids and labels."""

    def __init__(self, folder, seq_len: int, data_share: float, problem_share: float):
        super().__init__(folder, "train", seq_len, data_share)
        self.problems = ChatData(f"{folder}/reason_train.jsonl", folder, "train", seq_len)
        self.sha256, self.problem_share = [self.sha256, self.problems.sha256], problem_share
        self.files += self.problems.files

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        many, rows = round(self.problem_share * batch_size), []
        for batch, number in ((super().batch, batch_size - many), (self.problems.batch, many)):
            if number:  # the last batch of an epoch of problems has fewer
                ids, labels = batch(step, number, seed)
                more = (0, self.seq_len - ids.shape[1])
                ids, labels = F.pad(ids, more, value=0), F.pad(labels, more, value=-100)
                rows.append((ids, labels, torch.full((len(ids),), batch == self.problems.batch)))
        return tuple(map(torch.cat, zip(*rows, strict=True)))


def compute_loss(student_logits, teacher_logits, labels, is_problem, problem_weight, alpha):
    """Loss, parts, sum w: logits (B, S, V) and (B_text, S, V), labels (B, S), is_problem (B,)."""
    valid, is_text = labels != -100, ~is_problem
    ce = cross_entropy(student_logits, labels)  # (B, S), 0 at ignored labels
    kl = kl_divergence(student_logits[is_text], teacher_logits, 1.0)  # (B_text, S)
    text = alpha * ce[is_text] + (1 - alpha) * kl
    text = torch.where(valid[is_text], text, 0.0).sum()
    problems = problem_weight * ce[is_problem].sum()
    weight = valid[is_text].sum() + problem_weight * valid[is_problem].sum()
    N = weight.clamp(min=1e-9)  # 0 where all are problems that do not count
    return (text + problems) / N, {"text": text / N, "problems": problems / N}, weight


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--problem_share", type=float, default=0.5, help="of a batch's rows, rounded to whole ones")
    add("--problem_weight", type=float, default=1.0, help="of a problem's token; one of text: 1")
    add("--alpha", type=float, default=0.5, help="of text; 0: the teacher; 1: the labels")
    add("--data", default="out/data", help="folder made by dataset.prepare, with problems")
    add("--data_share", type=float, default=1.0, help="share of the text")
    add_common_flags(parser, out="out/multi_task", pair=True, fused=False, seq_len=256)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = TextAndProblems(args.data, args.seq_len, args.data_share, args.problem_share)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels, is_problem in run.batches(data):
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids[~is_problem])  # (B_text, S, V)
        loss, parts, weight = compute_loss(
            student_logits, teacher_logits, labels, is_problem, args.problem_weight, args.alpha
        )
        run.step(loss, weight=weight, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
