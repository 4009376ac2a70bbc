"""Students that teach themselves or one another: exits and what leaves by them, an average of the
weights, two students. Each equals the plain student where nothing is taught."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F

import train_pretrain
from dataset import PackedText
from distill import cross_entropy, kl_divergence
from eval import anytime
from files import read_json
from methods import ema_teacher, mutual, self_distillation
from methods.ema_teacher import follow
from model import ModelConfig, Record, Transformer, generate, load_model
from model.exits import exit_logits, first_sure, generate_early
from run import loss_together
from tests.explain import check
from tests.short_runs import SIX, check_resume, run, same_bits, weights

LN = math.log
IGNORE = -100
SHORT = [*SIX, "--steps", "2", "--batch_size", "8"]
THREE = ["--steps", 3, "--batch_size", 8]  # the state that a killed run left is of step 2


def random_logits(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def batch(n=2, B=2, S=4, V=5):
    """n tensors of logits (B, S, V), and labels (B, S) of 2 and 3 valid tokens."""
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
    labels[0, 2:] = labels[1, 0] = IGNORE
    return [random_logits(B, S, V, seed=seed) for seed in range(1, n + 1)], labels


def torchs(student, teacher, labels, T):
    """CE and KL by torch's own functions, means over the valid tokens."""
    valid = labels != IGNORE
    log_q, p = (student[valid] / T).log_softmax(-1), (teacher[valid] / T).softmax(-1)
    return F.cross_entropy(student[valid], labels[valid]), F.kl_div(log_q, p, reduction="batchmean")


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def tiny(layers=3, seed=7):
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.ndim == 2 else 1  # with opinions
    return model


@pytest.fixture(scope="module")
def plain(prepared_folder, tmp_path_factory):
    """The plain student of SHORT."""
    folder = tmp_path_factory.mktemp("no_teacher") / "plain"
    run(train_pretrain, *SHORT, "--model", "nano", "--data", prepared_folder, "--out", folder)
    return folder


# Exits.

EVEN, SURE = torch.zeros(1, 1, 2).double(), torch.tensor([[[LN(3), 0.0]]], dtype=torch.double)


def test_the_loss_of_exits_by_hand():
    """The deep exit says 3/4, 1/4, two shallow ones 1/2, 1/2 and what it says; label 1."""
    labels, kl = torch.tensor([[1]]), 0.75 * LN(1.5) + 0.25 * LN(0.5)
    found, parts = self_distillation.compute_loss([EVEN, SURE], SURE, labels, 2.0, 1.0, 0.3)
    exits = 0.3 * (LN(2) + LN(4)) / 2 + 0.7 * kl / 2
    mistakes = {
        "exits are summed, not averaged": LN(4) + 4 * exits,
        "the weight is missing": LN(4) + exits,
        "alpha sits on the KL": LN(4) + 0.7 * (LN(2) + LN(4)) + 0.3 * kl,
        "the last exit's own loss is missing": 2 * exits,
    }
    check(found, LN(4) + 2 * exits, mistakes)
    check(parts["ce"], LN(4), {})


@pytest.mark.parametrize("T, alpha, weight", [(1.0, 0.5, 1.0), (3.0, 0.2, 0.3), (2.0, 0.0, 4.0)])
def test_the_loss_of_exits_by_torch(T, alpha, weight):
    (*shallow, deep), labels = batch(3)
    ce = torchs(deep, deep, labels, T)[0]
    pairs = [torchs(one, deep, labels, T) for one in shallow]
    exits = sum(alpha * ce_k + (1 - alpha) * T**2 * kl for ce_k, kl in pairs) / 2
    found = self_distillation.compute_loss(shallow, deep, labels, weight, T, alpha)[0]
    assert found.item() == pytest.approx((ce + weight * exits).item(), rel=1e-10)


def leaking(shallow, deep, labels):
    """The defect: the deep exit is a teacher that is taught (no detach), KL(deep || shallow)."""
    log_q, p = shallow.log_softmax(-1), deep.softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1)[labels != IGNORE].mean()
    return cross_entropy(deep, labels)[labels != IGNORE].mean() + kl


def test_the_deep_exit_learns_from_labels_alone():
    """Its gradient is (q - one hot) / N: a missing stop lets it chase the shallow exit."""
    (shallow, deep), labels = batch()
    deep.requires_grad_()
    valid = labels != IGNORE
    hot = F.one_hot(labels.clamp(min=0), 5)
    expected = (deep.detach().softmax(-1) - hot) * valid[..., None] / 5
    ours = self_distillation.compute_loss([shallow], deep, labels, 1.0, 1.0, 0.0)[0]
    torch.testing.assert_close(gradient(ours, deep), expected)
    theirs = leaking(shallow, deep, labels)
    assert theirs.item() == pytest.approx(ours.item()), "the value does not tell"
    assert (gradient(theirs, deep) - expected).abs().max() > 0.01, "the gradient does"


def test_gradients_micro_batches_and_ignored_tokens_of_exits():
    (one, two, deep), labels = batch(3)

    def loss(one, two, deep, labels):
        return self_distillation.compute_loss([one, two], deep, labels, 0.7, 2.0, 0.3)[0]

    whole = loss(one, two, deep, labels)
    rows = [loss(*(x[i, None] for x in (one, two, deep, labels))) for i in (0, 1)]
    torch.testing.assert_close(whole, (2 * rows[0] + 3 * rows[1]) / 5)
    assert torch.autograd.gradcheck(
        lambda x, y: loss(x, y, deep, labels), (one.requires_grad_(), two.requires_grad_())
    )
    with torch.no_grad():
        for logits in (one, two, deep):
            logits[labels == IGNORE] = math.nan
        assert torch.equal(loss(one, two, deep, labels), whole)


def test_the_exit_after_the_last_layer_is_the_model():
    model, ids = tiny(), torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(0))
    record = Record("hidden")
    logits = model(ids, record=record)
    exits = exit_logits(model, record.hidden[1:])
    assert len(exits) == 3 and torch.equal(exits[-1], logits)
    cut = tiny()
    cut.model.layers = cut.model.layers[:1]  # the first exit is a model of one layer
    torch.testing.assert_close(exits[0], cut(ids))
    assert not torch.allclose(exits[0], exit_logits(model, record.hidden[:1])[0]), (
        "states[0] is the embedding: an exit there has seen no layer"
    )


def test_the_first_sure_exit_is_taken_and_the_last_where_none_is():
    confidence = torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.3, 0.8, 0.9, 0.2], [0.9, 0.1, 0.9, 0.3]])
    for threshold, taken in ((0.0, [0, 0, 0, 0]), (0.5, [0, 1, 1, 2]), (1.0, [2, 2, 2, 2])):
        assert first_sure(confidence, threshold).tolist() == taken


def test_decoding_that_leaves_early():
    model, prompt = tiny(), [5, 7, 3]
    options = {"use_cache": False, "stop_ids": (0, 2)}
    (whole,) = generate(model, [prompt], 12, **options)
    assert generate_early(model, prompt, 12, 1.0) == (whole, [3] * len(whole))
    cut = tiny()
    cut.model.layers = cut.model.layers[:1]
    (first,) = generate(cut, [prompt], 12, **options)
    assert generate_early(model, prompt, 12, 0.0) == (first, [1] * len(first))
    assert first != whole and len(whole) > 3
    made, depths = generate_early(model, prompt, 12, 0.2)
    assert {*depths} == {1, 2, 3}, "weights and threshold were chosen to have tokens of each"
    for n, (token, depth) in enumerate(zip(made, depths, strict=True)):
        record = Record("hidden")
        model(torch.tensor([prompt + made[:n]]), record=record)
        exits = [x[0, -1] for x in exit_logits(model, record.hidden[1:])]
        sure = [bool(x.softmax(-1).max() > 0.2) for x in exits]
        assert depth == (sure.index(True) + 1 if any(sure) else 3)
        assert token == exits[depth - 1].argmax()
    with pytest.raises(ValueError, match="the model's 32 positions"):
        generate_early(model, prompt, 30, 0.5)


def test_exits_that_weigh_nothing_leave_the_plain_student(prepared_folder, plain, tmp_path):
    run(
        self_distillation, *SHORT, "--data", prepared_folder, "--weight", 0, "--out", tmp_path / "x"
    )
    assert same_bits(plain, tmp_path / "x")


def test_exits_stopped_and_resumed_and_the_anytime_decoder(
    prepared_folder, tmp_path, monkeypatch, capsys
):
    flags = ["--data", prepared_folder, "--weight", 2, "--temperature", 2, "--alpha", 0.3]
    check_resume(self_distillation, [*flags, *THREE], tmp_path, monkeypatch, update=3)
    folder = tmp_path / "whole"
    words = ["--model", folder, "--data", prepared_folder, "--seq_len", 32, "--device", "cpu"]
    rows = run(anytime, *words)
    text = PackedText(prepared_folder, "val", 32)
    model = load_model(folder)
    ids, labels = next(text.evaluation(text.size, text.size))
    last = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).item()
    model.model.layers = model.model.layers[:1]
    first = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).item()
    for row, depth, loss in ((rows[0], 1, first), (rows[-1], 2, last)):
        assert row["depth"] == depth and row["loss"] == pytest.approx(loss, rel=1e-5)
    depths = [row["depth"] for row in rows]
    assert depths == sorted(depths), "who asks for more confidence waits longer"
    layer = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    assert rows[0]["mflop"] == pytest.approx(2 * (layer + head) / 1e6)
    assert rows[-1]["mflop"] == pytest.approx(2 * (2 * layer + head) / 1e6)
    with open(folder / "exits.csv", newline="") as file:
        written = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert written == rows
    (folder / "manifest.json").unlink()  # as in a downloaded folder
    with pytest.raises(ValueError, match="not a model that was trained here: .*--out"):
        run(anytime, *words)
    run(anytime, *words, "--out", tmp_path / "exits.csv")
    assert (tmp_path / "exits.csv").read_text() == (folder / "exits.csv").read_text()
    with pytest.raises(ValueError, match="exits.csv exists: pass --overwrite"):
        run(anytime, *words, "--out", tmp_path / "exits.csv")
    more = ["--prompt", "the sea", "--threshold", 0, "--max_new_tokens", 5]
    said, depth = run(anytime, *words, *more)
    assert depth in (0, 1) and f"the sea{said}" in capsys.readouterr().out


def test_a_student_of_one_layer_has_no_exit(prepared_folder, plain, tmp_path):
    from model import save_model

    model = load_model(plain)
    config = {**vars(model.config), "num_hidden_layers": 1}
    save_model(Transformer(ModelConfig(**config)), tmp_path / "one", prepared_folder)
    words = ["--data", prepared_folder, "--student", tmp_path / "one", "--out", tmp_path / "x"]
    with pytest.raises(ValueError, match="has 1 layer, so no exit before it"):
        run(self_distillation, *SHORT, *words)


# An average of the weights.


def test_the_average_worked_by_hand():
    """Weights 1, 2, 3 after three updates: a copy; 1/11 and 10/11; 2/12 and 10/12. Then rho."""
    student, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    expected = [1.0, 1 / 11 + 20 / 11]
    expected.append(expected[1] / 6 + 3 * 5 / 6)
    for updates, value in enumerate((1.0, 2.0, 3.0)):
        student.weight.data.fill_(value)
        follow(average, student, 0.9, updates)
        assert average.weight.item() == pytest.approx(expected[updates], rel=1e-6), (
            "the random start is to be forgotten at the first update"
        )
    follow(average, student, 0.9, 1000)
    assert average.weight.item() == pytest.approx(0.9 * expected[2] + 0.1 * 3, rel=1e-6)
    follow(average, student, 0.0, 1000)
    assert torch.equal(average.weight, student.weight)
    biased = 0.98**100  # the defect: rho from the start
    assert biased > 0.1 and math.prod(min(0.98, n / (n + 10)) for n in range(100)) == 0


def test_what_a_student_says_now_teaches_it_nothing():
    """KL of a model to its own output: 0 in value and gradient, which no loss curve shows."""
    (logits, _), labels = batch()
    logits.requires_grad_()
    loss, parts = ema_teacher.compute_loss(logits, logits, labels, 2.0, 0.0)
    assert abs(parts["kl"].item()) < 1e-12
    assert gradient(loss, logits).abs().max() < 1e-12


def test_an_average_that_is_not_heard_leaves_the_plain_student(prepared_folder, plain, tmp_path):
    words = ["--data", prepared_folder, "--alpha", 1, "--rho", 0]
    run(ema_teacher, *SHORT, *words, "--out", tmp_path / "x")
    assert same_bits(plain, tmp_path / "x")
    assert same_bits(plain, tmp_path / "x" / "student2"), "rho 0: the average is the student"


def test_the_average_is_resumed_and_evaluated(prepared_folder, plain, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ema_teacher, "follow", lambda *args: (seen.append(args[3]), follow(*args))[1]
    )
    flags = ["--data", prepared_folder, "--rho", 0.9, "--temperature", 2, "--alpha", 0.3]
    flags += ["--accumulation_steps", 2]
    record = check_resume(ema_teacher, [*flags, *THREE], tmp_path, monkeypatch, update=3)
    assert seen == [0, 1, 2, 0, 1, 2], "once per update, whatever the micro-batches"
    whole = tmp_path / "whole"
    assert same_bits(whole / "student2", tmp_path / "killed" / "student2")
    assert not same_bits(whole, whole / "student2") and not same_bits(whole, plain)
    assert record["metrics"]["val_loss_2"] != record["metrics"]["val_loss"]


# Two students.


def test_two_students_by_hand():
    """1/2, 1/2 and 3/4, 1/4, label 0: ln 2 and ln 4/3; KL both ways."""
    labels = torch.tensor([[0]])
    to_first = 0.75 * LN(1.5) + 0.25 * LN(0.5)  # KL(second || first)
    to_second = 0.5 * LN(2 / 3) + 0.5 * LN(2)
    found, parts = mutual.compute_loss(EVEN, SURE, labels, 1.0, 0.3)
    ce = LN(2) + LN(4 / 3)
    mistakes = {
        "the mean of both, not the sum": (0.3 * ce + 0.7 * (to_first + to_second)) / 2,
        "one direction for both": 0.3 * ce + 1.4 * to_first,
        "alpha sits on the KL": 0.7 * ce + 0.3 * (to_first + to_second),
    }
    check(found, 0.3 * ce + 0.7 * (to_first + to_second), mistakes)
    check(parts["kl"], to_first, {"the KL points to the other student": to_second})
    check(parts["kl_2"], to_second, {"the KL points to the other student": to_first})


def both_taught(first, second, labels):
    """The defect: no student is detached, each is also drawn to the other as its teacher."""
    total, valid = 0.0, labels != IGNORE
    for own, other in ((first, second), (second, first)):
        p = other.softmax(-1)
        total = total + (p * (p.log() - own.log_softmax(-1))).sum(-1)[valid].mean()
    return total


@pytest.mark.parametrize("T, alpha", [(1.0, 0.0), (2.0, 0.3)])
def test_each_student_is_drawn_as_by_a_frozen_teacher(T, alpha):
    (first, second), labels = batch()
    first.requires_grad_(), second.requires_grad_()
    loss, _ = mutual.compute_loss(first, second, labels, T, alpha)
    value = 0.0
    for own, other in ((first, second), (second, first)):
        ce, kl = torchs(own, other.detach(), labels, T)
        alone = alpha * ce + (1 - alpha) * T**2 * kl
        torch.testing.assert_close(gradient(loss, own), gradient(alone, own))
        value += alone.item()
    assert loss.item() == pytest.approx(value, rel=1e-10)
    if alpha == 0:
        wrong = both_taught(first, second, labels)
        assert wrong.item() == pytest.approx(loss.item()), "the value does not tell"
        apart = gradient(wrong, first) - gradient(loss, first)
        assert apart.abs().max() > 0.01, "a missing detach moves the teacher too"


def test_micro_batches_and_ignored_tokens_of_two():
    (first, second), labels = batch()
    whole = mutual.compute_loss(first, second, labels, 2.0, 0.3)[0]
    rows = [
        mutual.compute_loss(*(x[i, None] for x in (first, second, labels)), 2.0, 0.3)[0]
        for i in (0, 1)
    ]
    torch.testing.assert_close(whole, (2 * rows[0] + 3 * rows[1]) / 5)
    first[labels == IGNORE] = second[labels == IGNORE] = math.nan
    assert torch.equal(mutual.compute_loss(first, second, labels, 2.0, 0.3)[0], whole)


def test_students_that_are_strangers_are_plain_ones(prepared_folder, plain, tmp_path):
    run(mutual, *SHORT, "--data", prepared_folder, "--alpha", 1, "--out", tmp_path / "x")
    assert same_bits(plain, tmp_path / "x"), "the second student does not change the first"
    one, two = weights(tmp_path / "x"), weights(tmp_path / "x" / "student2")
    assert not any(torch.equal(one[k], two[k]) for k in one if "proj" in k), "equal peers: KL is 0"


def test_two_students_resumed(prepared_folder, plain, tmp_path, monkeypatch):
    flags = ["--data", prepared_folder, "--peer", "nano", "--temperature", 2, "--alpha", 0.3]
    record = check_resume(mutual, [*flags, *THREE], tmp_path, monkeypatch, update=6)
    whole = tmp_path / "whole"
    assert same_bits(whole / "student2", tmp_path / "killed" / "student2")
    assert not same_bits(whole, plain)
    models = [load_model(whole / name) for name in ("", "student2")]
    text = PackedText(prepared_folder, "val", 32)
    ids, labels = next(text.evaluation(8, 8))
    p = sum(model(ids).softmax(-1) for model in models) / 2
    expected = F.nll_loss(p.log().flatten(0, 1), labels.flatten()).item()
    found = read_json(whole / "run.json")["metrics"]["together_loss"]
    assert found == pytest.approx(expected, rel=1e-5) == record["metrics"]["together_loss"]
    assert loss_together(models, text.evaluation(3, 8)) == pytest.approx(expected, rel=1e-5)
    kl = kl_divergence(models[0](ids), models[1](ids), 1.0).mean()
    assert kl > 1e-5, "two students that say the same teach each other nothing"


def test_one_checkpoint_twice_is_refused(prepared_folder, plain, tmp_path):
    for more in ([], ["--peer", plain]):
        words = ["--data", prepared_folder, "--student", plain, *more, "--out", tmp_path / "x"]
        with pytest.raises(ValueError, match="twice is one student, who has nothing to tell"):
            run(mutual, *SHORT, *words)
