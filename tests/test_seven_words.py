"""Run takes what methods need: each is a lesson here of a few lines, stopped and resumed.

two students       learn from each other; both are saved and evaluated
two teachers       one student learns from their average
projection         hidden states matched through a module of the lesson's own
discriminator      a second optimizer with a rate of its own
EMA copy           frozen, kept with the student, changed by the lesson after each update
sampling           the student writes what it is then taught on
some steps         have no teacher
weights            a loss that is a mean over something else than labels
"""

import copy
import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_distill_reason
import train_pretrain
from dataset import ChatData, PackedText, add_data_flags
from distill import cross_entropy, kl_divergence, reasoning_weights, weighted_mean
from files import file_hash, read_json
from model import Record, generate, load_model, make_or_load
from run import Run, add_common_flags, evaluate, new_parser
from run.optimizer import Optimizer, learning_rate
from tests.short_runs import Killed, kill_in_update, make_teacher, run, same_bits, weights

STEPS = ["--steps", "6", "--batch_size", "4", "--seq_len", "32", "--warmup", "2"]
STEPS += ["--eval_every", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("seven"), prepared_folder)


def args_of(data, teacher, out, *words):
    parser = new_parser("")
    add_data_flags(parser)
    add_common_flags(parser, out=out, pair=True)
    words = ["--data", data, "--teacher", teacher, *STEPS, *words]
    return parser.parse_args([str(word) for word in words])


def mean_ce(logits, labels):
    return weighted_mean(cross_entropy(logits, labels), labels != -100)


def mean_kl(logits, teacher_logits, labels):
    return weighted_mean(kl_divergence(logits, teacher_logits, 1.0), labels != -100)


def state_of(run) -> dict:
    """All that a run keeps, without its seconds."""
    state = run.training.state_dict()
    meter, *rows = (
        {name: value for name, value in part.items() if name != "seconds"}
        for part in (state["meter"], *state["rows"])
    )
    return {**state, "meter": meter, "rows": rows}


def equal(first, second) -> bool:
    """Two nested states, to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.fixture
def make(prepared_folder, teacher, tmp_path, monkeypatch):
    """make(lesson): run it whole, and run it killed and resumed; returns the first of the two."""

    def make(lesson, *words, optimizers=1):
        whole = lesson(args_of(prepared_folder, teacher, tmp_path / "whole", *words))
        killed = (prepared_folder, teacher, tmp_path / "killed", *words)
        with monkeypatch.context() as killing, pytest.raises(Killed):
            kill_in_update(killing, 5 * optimizers)  # the last saved state is of step 4
            lesson(args_of(*killed))
        assert not (tmp_path / "killed" / "run.json").exists()
        resumed = lesson(args_of(*killed, "--resume"))
        assert whole.training.step == 6
        assert equal(state_of(whole), state_of(resumed))
        return whole

    return make


# Two students.


def mutual_learning(args) -> Run:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    first, second = run.student("nano", text), run.student("nano", text)
    run.optimize(first, second)
    for input_ids, labels in run.batches(text):
        a, b = first(input_ids), second(input_ids)
        ce = mean_ce(a, labels) + mean_ce(b, labels)
        run.step(ce + mean_kl(a, b.detach(), labels) + mean_kl(b, a.detach(), labels), ce=ce)
    run.finish()
    return run


def test_two_students_learn_from_each_other(make, tmp_path, prepared_folder):
    run = make(mutual_learning)
    first, second = run.training.students
    metrics = read_json(tmp_path / "whole" / "run.json")["metrics"]
    text = PackedText(prepared_folder, "val", 32)
    for student, folder, ending in ((first, "", ""), (second, "student2", "_2")):
        saved = weights(tmp_path / "whole" / folder)
        assert equal(saved, dict(student.state_dict()))
        assert same_bits(tmp_path / "whole" / folder, tmp_path / "killed" / folder)
        alone = evaluate(student, text.evaluation(4, 400), text.bytes_per_token)
        for name in ("val_loss", "ece", "bits_per_byte"):
            assert metrics[name + ending] == pytest.approx(alone[name], rel=1e-6)
    assert not same_bits(tmp_path / "whole", tmp_path / "whole" / "student2")
    assert (tmp_path / "whole" / "best" / "student2" / "tokenizer.json").is_file()
    assert load_model(tmp_path / "whole" / "best" / "student2")


# Two teachers.


def test_two_teachers(make, tmp_path, prepared_folder, teacher):
    flags = ["--model", "nano", "--data", prepared_folder, *STEPS, "--steps", 3, "--seed", 1]
    run(train_pretrain, *flags, "--out", tmp_path / "second")

    def two_teachers(args) -> Run:
        run = Run(args)
        text = PackedText(args.data, "train", args.seq_len)
        teachers = [run.teacher(folder, text) for folder in (teacher, tmp_path / "second")]
        student = run.student("nano", text)
        run.optimize(student)
        for input_ids, labels in run.batches(text):
            with torch.no_grad():
                average = sum(model(input_ids).softmax(-1) for model in teachers) / 2
            kl = mean_kl(student(input_ids), average.log(), labels)
            run.step(kl, kl=kl)
        run.finish()
        return run

    before = [file_hash(folder / "model.safetensors") for folder in (teacher, tmp_path / "second")]
    run_ = make(two_teachers)
    record = read_json(tmp_path / "whole" / "run.json")
    assert record["sources"]["teacher_sha256"] == before
    for model, folder in zip(run_.teachers, (teacher, tmp_path / "second"), strict=True):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert equal(dict(model.state_dict()), weights(folder))
    text = PackedText(prepared_folder, "val", 32)
    beside = evaluate(run_.training.students[0], text.evaluation(4, 400), None, run_.teachers[0])
    assert record["metrics"]["kl"] == pytest.approx(beside["kl"], rel=1e-5)


# A projection, and hidden states.


def match_hidden_states(args) -> Run:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    teacher = run.teacher(args.teacher, text)
    student = run.student("nano", text)
    layers = len(student.model.layers)
    projection = nn.Linear(student.config.hidden_size, teacher.config.hidden_size)
    run.optimize(student, projection)
    for input_ids, labels in run.batches(text):
        ours, theirs = Record("hidden"), Record("hidden")
        ce = mean_ce(student(input_ids, record=ours), labels)
        with torch.no_grad():
            teacher(input_ids, record=theirs)
        assert len(ours.hidden) == layers + 1 and not ours.attention
        mse = sum(
            (projection(mine) - other).pow(2).mean()
            for mine, other in zip(ours.hidden[1:], theirs.hidden[1:], strict=True)
        )
        run.step(ce + mse, ce=ce, mse=mse)
    run.finish()
    return run


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_projection_learns_beside_the_student(make, tmp_path, optimizer):
    run = make(match_hidden_states, "--optimizer", optimizer, "--weight_decay", "0.5")
    student, projection = run.training.modules
    *_, part = run.training.optimizers[0].parts
    assert type(part) is torch.optim.AdamW
    assert [group["weight_decay"] for group in part.param_groups] == [0.0]
    held = [p for group in part.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in projection.parameters()]
    assert weights(tmp_path / "whole").keys() == student.state_dict().keys()  # it is not saved
    assert all(part.state[p]["step"] == 6 and part.state[p]["exp_avg"].any() for p in held)


# A second optimizer.


def adversarial(args) -> Run:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    teacher = run.teacher(args.teacher, text)
    student = run.student("nano", text)
    discriminator = nn.Sequential(nn.Linear(text.vocab_size, 8), nn.GELU(), nn.Linear(8, 1))
    run.optimize(student)
    run.optimize(discriminator, learning_rate=0.003, grad_clip=0.0)
    for input_ids, labels in run.batches(text):
        logits = student(input_ids)
        with torch.no_grad():
            teacher_logits = teacher(input_ids)
        true, false = discriminator(teacher_logits), discriminator(logits.detach())
        judged = F.softplus(-true).mean() + F.softplus(false).mean()
        discriminator.requires_grad_(False)  # the student's part does not teach it
        fooled = F.softplus(-discriminator(logits)).mean()
        discriminator.requires_grad_(True)
        ce = mean_ce(logits, labels)
        run.step(ce + 0.1 * fooled + judged, ce=ce, judged=judged)
    run.finish()
    return run


def test_a_second_optimizer_has_a_rate_of_its_own(make, tmp_path, monkeypatch):
    rates, update = [], Optimizer.update
    monkeypatch.setattr(
        Optimizer, "update", lambda self, rate: (rates.append((self, rate)), update(self, rate))
    )
    run = make(adversarial, optimizers=2)
    first, second = run.training.optimizers
    assert (first.args.learning_rate, second.args.learning_rate) == (0.012, 0.003)
    assert (first.args.grad_clip, second.args.grad_clip) == (1.0, 0.0)
    for optimizer in (first, second):
        seen = [rate for whose, rate in rates if whose is optimizer]
        assert seen == [learning_rate(step, 6, optimizer.args) for step in range(6)]
    with open(tmp_path / "whole" / "log.csv", newline="") as file:
        logged = {int(row["step"]): float(row["learning_rate"]) for row in csv.DictReader(file)}
    assert logged == {step: learning_rate(step - 1, 6, first.args) for step in logged}


# A copy that follows.


def averaged(args) -> Run:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    student = run.student("nano", text)
    ema = copy.deepcopy(student).requires_grad_(False)
    run.optimize(student, ema)
    run.seen = [[p.detach().clone() for p in student.parameters()]]
    for input_ids, labels in run.batches(text):
        ce = mean_ce(student(input_ids), labels)
        if run.step(ce, ce=ce):
            with torch.no_grad():
                for mean, now in zip(ema.parameters(), student.parameters(), strict=True):
                    mean.lerp_(now, 0.25)
            run.seen.append([p.detach().clone() for p in student.parameters()])
    run.finish()
    return run


@pytest.mark.parametrize("parts", [1, 2])
def test_an_average_of_the_weights(make, parts):
    """m_n = 0.75 m_(n-1) + 0.25 w_n, once an update, whatever the micro-batches."""
    run = make(averaged, "--accumulation_steps", parts)
    assert len(run.seen) == 7
    expected, *later = run.seen
    for weights_then in later:
        expected = [0.75 * m + 0.25 * w for m, w in zip(expected, weights_then, strict=True)]
    ema = list(run.training.modules[1].parameters())
    for mean, value in zip(ema, expected, strict=True):
        torch.testing.assert_close(mean, value, rtol=0, atol=1e-6)
    assert not torch.equal(ema[0], run.seen[-1][0])


# Batches that the student writes.

PROMPT, NEW = 8, 8


def on_policy(args) -> Run:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    teacher = run.teacher(args.teacher, text)
    student = run.student(args.student, text)
    run.written, run.draws = [], []

    def write(input_ids, labels, generator):
        """The first tokens of every row, and what the student says next, labels on that alone."""
        prompts = input_ids[:, :PROMPT].tolist()
        options = dict(temperature=1.0, generator=generator, stop_ids=tuple(range(40)))
        rows = generate(student, prompts, NEW, **options)
        whole = torch.zeros(len(rows), PROMPT + NEW, dtype=torch.long)
        learned = torch.full_like(whole, -100)
        for number, (prompt, new) in enumerate(zip(prompts, rows, strict=True)):
            end = PROMPT + len(new)
            whole[number, :end] = torch.tensor(prompt + new)
            learned[number, PROMPT:end] = whole[number, PROMPT:end]
        run.written.append(whole)
        run.draws.append(generator.initial_seed())
        return whole[:, :-1], learned[:, 1:]

    run.optimize(student)
    for input_ids, labels in run.batches(text, sample=write):
        with torch.no_grad():
            teacher_logits = teacher(input_ids)
        kl = mean_kl(student(input_ids), teacher_logits, labels)
        run.step(kl, kl=kl)
    run.finish()
    return run


def test_samples_follow_from_weights_seed_and_step(make, prepared_folder, teacher, tmp_path):
    """Made once a step, before it is cut: the same for every number of micro-batches."""
    words = ("--accumulation_steps", "2", "--learning_rate", "0.003")
    run = make(on_policy, *words)
    written = run.written
    assert len(written) == 6
    lengths = (torch.stack(written)[:, :, PROMPT:] > 0).sum(-1)
    assert lengths.min() < NEW and lengths.unique().numel() > 2  # rows of many lengths
    again = on_policy(args_of(prepared_folder, teacher, tmp_path / "again", *words))
    assert equal(written, again.written) and equal(state_of(run), state_of(again))
    other, one = (
        on_policy(args_of(prepared_folder, teacher, tmp_path / name, "--steps", 1, *more))
        for name, more in (("other", (*words, "--seed", 1)), ("one", words[2:]))
    )
    assert not torch.equal(written[0], other.written[0])
    assert torch.equal(written[0], one.written[0])
    assert len({*run.draws, *other.draws}) == 7  # every step of every seed draws its own
    first, same = (x.training.log.rows[0]["train_loss"] for x in (run, one))
    assert first == pytest.approx(same, rel=1e-5)


def test_sampling_is_charged(prepared_folder, teacher, tmp_path, monkeypatch):
    words = ("--steps", 2, "--student", teacher)
    run = on_policy(args_of(prepared_folder, teacher, tmp_path / "run", *words))
    kinds = run.training.meter.kinds
    assert set(kinds) == {"sampling", f"batch (4, {PROMPT + NEW - 1})"}
    parameters = sum(p.numel() for p in run.training.students[0].parameters())
    times, _, flops = kinds["sampling"]
    assert times == 2 and flops > 2 * 2 * parameters * 4 * PROMPT  # 2 a weight, token and pass


# Steps without a teacher.


def now_and_then(args) -> Run:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    teacher = run.teacher(args.teacher, text)
    student = run.student("nano", text)
    run.optimize(student)
    run.asked = []
    teacher.register_forward_hook(lambda *_: run.asked.append(run.training.step))
    for input_ids, labels in run.batches(text):
        logits = student(input_ids)
        loss = mean_ce(logits, labels)
        parts = {"ce": loss}
        if run.training.step % 2:
            parts["kl"] = mean_kl(logits, teacher(input_ids), labels)
            loss = (loss + parts["kl"]) / 2
        run.step(loss, **parts)
    run.finish()
    return run


def test_every_second_step_has_no_teacher(make, tmp_path):
    run = make(now_and_then)
    assert set(run.asked) == {1, 3, 5}
    with open(tmp_path / "whole" / "log.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert {step: bool(row["kl"]) for step, row in rows.items()} == {
        1: False, 2: True, 4: True, 6: True,
    }  # fmt: skip


# A mean over something else.


def reason(prepared_folder, out, *words):
    flags = ["--student", "nano", "--tokenizer", prepared_folder, *STEPS, "--seq_len", 256]
    flags += ["--data", prepared_folder / "reason_train.jsonl", "--optimizer", "adamw"]
    return run(train_distill_reason, *flags, *words, "--out", out)


TAGS = ("--tag_weight", 30, "--think_weight", 0.1, "--answer_weight", 3)


def test_weighted_micro_batches_give_the_same_student(prepared_folder, tmp_path):
    for parts in (1, 4):
        words = ("--accumulation_steps", parts, "--steps", 3, "--learning_rate", 0.003)
        reason(prepared_folder, tmp_path / str(parts), *TAGS, *words)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert all(torch.allclose(one[key], four[key], atol=2e-4) for key in one)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_gradient_is_that_of_the_whole_batch(parts, prepared_folder, tmp_path, monkeypatch):
    """sum(w * CE) / sum(w) of the batch in one piece, by torch's own cross-entropy."""
    gradients, sums, clip, step = [], [], Optimizer.clip, Run.step

    def clip_and_look(self, scale):
        norm = clip(self, scale)
        gradients.append([p.grad.clone() for p in self.parameters])
        return norm

    def step_and_look(self, loss, weight, **named):
        sums.append((self.piece_labels, weight.item()))
        return step(self, loss, weight, **named)

    monkeypatch.setattr(Optimizer, "clip", clip_and_look)
    monkeypatch.setattr(Run, "step", step_and_look)
    words = ("--accumulation_steps", parts, "--steps", 1, "--grad_clip", 0)
    reason(prepared_folder, tmp_path / "run", *TAGS, *words)
    assert len(sums) == parts
    shares = [weight / labels for labels, weight in sums]
    assert parts == 1 or max(shares) > 1.05 * min(shares)  # weights and labels disagree

    torch.manual_seed(0)
    data = ChatData(prepared_folder / "reason_train.jsonl", prepared_folder, "train", 256)
    model = make_or_load("nano", data.vocab_size)
    input_ids, labels = data.batch(0, 4, 0)
    w = reasoning_weights(labels, 30, 0.1, 3, *data.special_ids())
    ce = F.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten(), reduction="none")
    loss = (w.flatten() * ce).sum() / w.sum()
    loss.backward()
    order = Optimizer([model], args_of("x", "x", "x", "--optimizer", "adamw")).parameters
    for found, parameter in zip(gradients[0], order, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["train_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(row["ce"]) == pytest.approx(loss.item(), rel=1e-5)
