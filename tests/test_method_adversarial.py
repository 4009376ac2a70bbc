"""A discriminator against the student (methods/adversarial.py): two players, and no gradient of the
one that reaches the other by a path that is not meant."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_distillation
from distill.hidden import normalise
from methods import adversarial
from methods.adversarial import compute_loss, play
from model import ModelConfig, Record, Transformer, save_model
from tests.explain import check
from tests.short_runs import SIX, check_resume, nearly_equal, run

LN = math.log
VALID = torch.tensor([[True, True, False], [True, True, True]])


def judge(width=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, 1)).double()


def states(seed=0):
    """Of student and teacher, (2, 3, 5) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)


def test_the_game_by_hand():
    """Width 1: a normalised state is its sign. C(x) = x ln 3 gives the teacher's +1 ln 3, the
    student's -1 -ln 3, and softplus(-ln 3) = ln(1 + 1/3), softplus(ln 3) = ln 4."""
    discriminator = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(discriminator.weight, LN(3))
    seen, target = torch.tensor([[[-7.0]]]).double(), torch.tensor([[[2.0]]]).double()
    found = play(seen, target, discriminator, torch.tensor([[True]]))
    found = {name: value.item() for name, value in found.items()}
    swapped = {"student and teacher are swapped": 2 * LN(4)}
    check(found["judged"], 2 * LN(4 / 3), swapped, rel=1e-6)
    saturating = {
        "the saturating form, -softplus(C), or its sign": -LN(4 / 3),
        "swapped": LN(4 / 3),
    }
    check(found["fooled"], LN(4), saturating, rel=1e-6)
    assert found["accuracy"] == 1


def test_a_blind_judge_says_half():
    blind = nn.Linear(5, 1, bias=False).double()
    nn.init.zeros_(blind.weight)
    found = play(*states(), blind, VALID)
    assert found["judged"].item() == pytest.approx(2 * LN(2))
    assert found["fooled"].item() == pytest.approx(LN(2))
    assert found["accuracy"].item() == 0.5


def test_the_players_lower_torch_s_binary_cross_entropy():
    (seen, target), discriminator = states(), judge()
    found = play(seen, target, discriminator, VALID)
    norm = [F.rms_norm(x, (5,), eps=1e-12)[VALID] for x in (seen, target)]
    false, true = (discriminator(x) for x in norm)
    bce = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones_like(true), torch.zeros_like(true)
    judged = bce(true, ones) + bce(false, zeros)
    assert found["judged"].item() == pytest.approx(judged.item(), rel=1e-12)
    assert found["fooled"].item() == pytest.approx(bce(false, ones).item(), rel=1e-12)


def gradients(loss, *wanted):
    return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)


def mutant(seen, target, discriminator, valid):
    """As it is often written: one pass of the student's states for both players."""
    seen, target = normalise(seen), normalise(target)
    true, false = discriminator(target), discriminator(seen)
    return {"judged": (F.softplus(-true) + F.softplus(false)).mean(),
            "fooled": F.softplus(-false).mean()}  # fmt: skip


def test_each_player_learns_from_its_own_loss_alone():
    (seen, target), discriminator = states(), judge()
    seen.requires_grad_(), target.requires_grad_()
    first = discriminator[0].weight
    game = play(seen, target, discriminator, VALID)
    assert gradients(game["judged"], seen) == (None,), "the student helps to be told apart"
    assert gradients(game["fooled"], first) == (None,), "the judge goes blind for the student"
    assert gradients(game["judged"] + game["fooled"], target) == (None,), "the teacher learns"
    assert gradients(game["judged"], first)[0].any() and gradients(game["fooled"], seen)[0].any()
    assert all(p.requires_grad for p in discriminator.parameters()), "the judge stays frozen"
    wrong = mutant(seen, target, discriminator, VALID)
    helped, blinded = gradients(wrong["judged"], seen)[0], gradients(wrong["fooled"], first)[0]
    assert helped.any() and blinded.any(), "the mutant is not told apart"
    # Worse than a path too many: the student's two gradients point against each other.
    fooling = gradients(wrong["fooled"], seen)[0]
    assert (helped * fooling).sum() < 0


def test_gradients_by_finite_differences():
    (seen, target), discriminator = states(), judge()
    assert torch.autograd.gradcheck(
        lambda x: play(x, target, discriminator, VALID)["fooled"], seen.requires_grad_()
    )


def test_masked_states_count_nothing_and_size_gives_nothing_away():
    (seen, target), discriminator = states(), judge()
    before = play(seen, target, discriminator, VALID)
    masked = [x.clone() for x in (seen, target)]
    for x in masked:
        x[0, 2] = torch.nan
    for other in (masked, (seen * 50, target)):
        after = play(*other, discriminator, VALID)
        for name in before:
            assert after[name].item() == pytest.approx(before[name].item(), rel=1e-4), name
    rows = [play(seen[n:][:1], target[n:][:1], discriminator, VALID[n:][:1]) for n in (0, 1)]
    for name in before:  # 2 and 3 tokens
        both = (2 * rows[0][name] + 3 * rows[1][name]) / 5
        assert both.item() == pytest.approx(before[name].item(), rel=1e-12), name


def test_the_whole_loss_and_its_limit():
    mine, theirs, labels = (
        Record("hidden"),
        Record("hidden"),
        torch.tensor([[1, 2, -100], [0, 3, 4]]),
    )
    mine.logits, theirs.logits = states(4)
    mine.hidden, theirs.hidden = [None, states(5)[0]], [None, states(5)[1]]
    project, discriminator = nn.Linear(5, 5).double(), judge()
    game = play(project(mine.hidden[-1]), theirs.hidden[-1], discriminator, labels != -100)
    lesson = train_distillation.compute_loss(mine.logits, theirs.logits, labels, 1.0, 0.3)[0]
    for weight in (0.0, 0.7):
        loss, parts = compute_loss(mine, theirs, labels, project, discriminator, 0.3, weight)
        expected = lesson + weight * game["fooled"] + game["judged"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert set(parts) == {"ce", "kl", "fooled", "judged", "accuracy"}


def test_a_cloud_of_states_is_moved_onto_another():
    """What it claims: no pair is given, and yet the student's states end up spread as the
    teacher's. Points on two arcs of a circle, a quarter turn apart; 150 steps of both."""
    generator = torch.Generator().manual_seed(0)
    angle = 0.4 * torch.randn(256, 1, generator=generator)
    arc = torch.cat((angle.cos(), angle.sin()), -1)
    start, target = arc[None, :128], arc[None, 128:].flip(-1)  # other points, the axes swapped
    torch.manual_seed(0)
    turn, discriminator = nn.Linear(2, 2, bias=False), judge(2).float()
    nn.init.eye_(turn.weight)
    players = [torch.optim.Adam(m.parameters(), 0.02) for m in (turn, discriminator)]
    valid = torch.ones(1, 128, dtype=torch.bool)

    def middle(x):
        return normalise(x).mean(1)[0]

    apart = (middle(turn(start)) - middle(target)).norm().item()
    for _ in range(150):
        game = play(turn(start), target, discriminator, valid)
        (game["fooled"] + game["judged"]).backward()
        for player in players:
            player.step()
            player.zero_grad()
    assert apart > 1.5
    assert (middle(turn(start)) - middle(target)).norm() < 0.3 * apart


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adversarial") / "teacher"
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig(400, 32, 2, 2, 1, 16, 64)), folder, prepared_folder)
    return folder


def test_both_players_stop_and_resume_to_the_same_bits(
    prepared_folder, teacher, tmp_path, monkeypatch
):
    flags = ["--data", prepared_folder, "--teacher", teacher, "--units", 8, "--weight", 0.3]
    flags += ["--discriminator_rate", 0.01, "--alpha", 0.2]
    check_resume(adversarial, flags, tmp_path, monkeypatch, update=10)  # two a step


def test_a_judge_that_only_watches_changes_nothing(prepared_folder, teacher, tmp_path):
    flags = [*SIX, "--steps", 2, "--data", prepared_folder, "--teacher", teacher]
    run(adversarial, *flags, "--weight", 0, "--out", tmp_path / "watched")
    run(train_distillation, *flags, "--out", tmp_path / "lesson")
    assert nearly_equal(tmp_path / "watched", tmp_path / "lesson")


def test_ranges(prepared_folder, teacher, tmp_path):
    flags = ["--data", prepared_folder, "--teacher", teacher, "--out", tmp_path / "run"]
    for flag, value in (("--weight", -1), ("--units", 0), ("--discriminator_rate", 2)):
        with pytest.raises(ValueError, match=f"{flag} .* must be between"):
            run(adversarial, *flags, flag, value)
