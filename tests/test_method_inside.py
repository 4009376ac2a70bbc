"""Runs of the four methods that match what is inside the models: stopped and resumed, the weight 0
against lesson 2, projections that learn, and what is refused."""

import pytest
import torch

import train_distillation
from methods import attention, contrastive, hidden_states, relations
from run import Run
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, check_resume, logged, nearly_equal, run

RESUMED = {  # the part of the loss, and flags: with those below, every flag of every method
    "hidden": (hidden_states, "--layers 1:2,2:1 --metric cosine --weight 2"),
    "values": (attention, "--match values --layers uniform --relation_heads 2 --weight 2"),
    "graph": (relations, "--relation graph --layers uniform --weight 2"),
    "contrastive": (contrastive, "--samples 32 --tau 0.2 --weight 0.5"),
}
METHODS = (hidden_states, attention, relations, contrastive)


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_random_teacher(tmp_path_factory.mktemp("inside"), prepared_folder)


@pytest.fixture(scope="module")
def lesson(prepared_folder, teacher, tmp_path_factory):
    """Lesson 2 by the teacher alone, two steps."""
    out = tmp_path_factory.mktemp("lesson") / "run"
    flags = ["--data", prepared_folder, "--teacher", teacher, *SIX, "--steps", 2]
    run(train_distillation, *flags, "--alpha", 0, "--fused", "no", "--out", out)
    return out


@pytest.mark.parametrize("part", RESUMED)
def test_stopped_and_resumed(part, prepared_folder, teacher, tmp_path, monkeypatch):
    script, flags = RESUMED[part]
    flags = ["--data", prepared_folder, "--teacher", teacher, *flags.split()]
    check_resume(script, flags, tmp_path, monkeypatch)
    first, *_, last = (float(value) for (value,) in logged(tmp_path / "whole", part))
    assert 0 < last < 10 and last != first, f"log.csv does not tell how {part} changes"


@pytest.mark.parametrize("script", METHODS)
def test_at_weight_0_it_is_lesson_2(script, lesson, prepared_folder, teacher, tmp_path):
    """The same student, batches and updates as the KL alone, but for rounding."""
    flags = ["--data", prepared_folder, "--teacher", teacher, *SIX, "--steps", 2]
    run(script, *flags, "--weight", 0, "--out", tmp_path / "method")
    assert nearly_equal(lesson, tmp_path / "method")


@pytest.mark.parametrize("script, count", [(hidden_states, 2), (contrastive, 1)])
def test_projections_learn_without_decay(
    script, count, prepared_folder, teacher, tmp_path, monkeypatch
):
    """One that no optimizer knows stays random; one that decays shrinks to nothing."""
    seen, optimize = [], Run.optimize

    def spy(self, *modules, **flags):
        seen.extend(
            (self, {k: v.clone() for k, v in module.state_dict().items()}) for module in modules
        )
        optimize(self, *modules, **flags)

    monkeypatch.setattr(Run, "optimize", spy)
    flags = ["--data", prepared_folder, "--teacher", teacher, *SIX, "--weight_decay", 1]
    run(script, *flags, "--steps", 2, "--out", tmp_path / "run")
    training = seen[0][0].training
    *_, extra = training.optimizers[0].parts
    assert [group["weight_decay"] for group in extra.param_groups] == [0.0]
    learned = training.modules[1].state_dict()
    assert len(learned) == count
    assert all(not torch.equal(learned[name], before) for name, before in seen[1][1].items())


@pytest.mark.parametrize(
    "script, flags, said",
    [
        (hidden_states, "--weight -1", "--weight -1.0 must be between 0 and 10000"),
        (hidden_states, "--layers 1:9", "--layers 1:9 asks for 1:9: the student has layers 1 to 2"),
        (attention, "--match maps --student micro", "heads must be as many"),
        (attention, "--relation_heads 3", "3 relation heads cannot share 1 x 32 numbers"),
        (attention, "--relation_heads 0", "--relation_heads 0 must be between 1 and 1,024"),
        (relations, "--samples 2", "--samples 2 must be between 3 and 512"),
        (contrastive, "--tau 0", "--tau 0.0 must be between 0.001 and 1000"),
    ],
)
def test_what_cannot_work_is_refused(script, flags, said, prepared_folder, teacher, tmp_path):
    folders = ["--data", prepared_folder, "--teacher", teacher, "--out", tmp_path / "run"]
    with pytest.raises(ValueError, match=said):
        run(script, *folders, *SIX, *flags.split())


def test_the_weight_of_a_relation_is_its_own_where_none_is_given(
    prepared_folder, teacher, tmp_path
):
    flags = ["--data", prepared_folder, "--teacher", teacher, *SIX, "--steps", 1]
    run(relations, *flags, "--relation", "angle", "--samples", 16, "--out", tmp_path / "run")
    loss, kl, angle = map(float, logged(tmp_path / "run", "train_loss", "kl", "angle")[0])
    assert loss == pytest.approx(kl + 3 * angle, rel=1e-4) and angle > 0.001


def test_conversations(prepared_folder, teacher, tmp_path):
    """Rows with padding and prompts, cut into micro-batches of unequal widths."""
    flags = ["--data", prepared_folder / "reason_train.jsonl", "--teacher", teacher, *SIX]
    flags += ["--tokenizer", prepared_folder, "--seq_len", 256, "--steps", 1]
    run(relations, *flags, "--accumulation_steps", 2, "--out", tmp_path / "run")
    loss, kl, rkd = map(float, logged(tmp_path / "run", "train_loss", "kl", "rkd")[0])
    assert loss == pytest.approx(kl + rkd, rel=1e-4) and rkd > 0.001


def test_maps_of_unequal_heads_averaged(prepared_folder, teacher, tmp_path):
    """Micro's 3 heads learn from nano's 2."""
    flags = ["--data", prepared_folder, "--teacher", teacher, *SIX, "--steps", 1]
    flags += ["--match", "maps", "--average_heads", "--student", "micro", "--out", tmp_path / "run"]
    flags += ["--weight", 1]
    run(attention, *flags)
    loss, kl, maps = map(float, logged(tmp_path / "run", "train_loss", "kl", "attention")[0])
    assert loss == pytest.approx(kl + maps, rel=1e-4) and maps > 1e-4
