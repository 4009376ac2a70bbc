"""What is measured of a teacher, by hand; a teacher of softer logits; the experiment, tiny."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

from eval import plots
from eval.experiments import common, scales, softened, teacher_quality
from eval.experiments.rows import read_rows
from eval.pictures.methods import PICTURES, rank_correlation
from files import Finished
from model import load_model
from tests.short_runs import make_teacher, run, run_here
from tests.test_eval import TINY


def test_separation_by_hand():
    """Two classes around 0 and 4, each of two states one away from its mean; the center is 2."""
    states = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [4.0, -1.0], [4.0, 1.0]])
    labels = torch.tensor([5, 5, 7, 7])
    assert teacher_quality.separation(states, labels) == pytest.approx((4 * 4) / (4 * 1))


def test_principal_components_are_the_directions_of_most_spread():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.1])
    points = teacher_quality.principal_components(states[:100], states[100:])
    values, vectors = np.linalg.eigh(np.cov(states[:100].numpy().T))
    centred = (states[100:] - states[:100].mean(0)).numpy()
    for column, which in enumerate((2, 1)):  # eigh sorts upwards
        expected = centred @ vectors[:, which] / math.sqrt(values[which])
        sign = np.sign((expected * points[:, column].numpy()).sum())
        np.testing.assert_allclose(points[:, column], sign * expected, rtol=1e-3, atol=1e-3)


class Uniform:
    """Says 1/2 for token 0 and 1/6 for each of three others, whatever it reads."""

    class lm_head:
        weight = torch.zeros(1)

        def __new__(cls, hidden):
            return torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]).log().expand(len(hidden), 4)

    def model(self, input_ids):
        return input_ids[..., None].float()


def test_entropy_off_the_target_by_hand():
    class Text:
        def evaluation(self, batch_size, most):
            yield torch.tensor([[3, 3]]), torch.tensor([[0, 1]])

    _, labels, entropy = teacher_quality.states_of(Uniform(), Text())
    assert labels.tolist() == [0, 1]
    without_1 = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))  # 1/2, 1/6, 1/6 over 5/6
    torch.testing.assert_close(entropy, torch.tensor([math.log(3), without_1]))


def test_a_softened_teacher_has_its_logits_divided(prepared_folder, tmp_path):
    teacher, out = make_teacher(tmp_path, prepared_folder), tmp_path / "softened"
    run(softened, "--teacher", teacher, "--temperature", 4, "--out", out)
    ids = torch.arange(20)[None]
    soft, whole = load_model(out)(ids), load_model(teacher)(ids)
    torch.testing.assert_close(soft * 4, whole)
    with pytest.raises(ValueError, match="--overwrite"):
        run(softened, "--teacher", teacher, "--out", out)
    with pytest.raises(Finished):
        run(softened, "--teacher", teacher, "--out", out, "--resume")


def test_rank_correlation_by_hand():
    """Two of four neighbours in rank are exchanged: 1 - 6 (1 + 1) / (4 (16 - 1)) = 0.8."""
    groups = {}
    for kind, ece, loss in (("a", 0.1, 4.0), ("b", 0.3, 4.1), ("c", 0.2, 4.2), ("d", 9.0, 5.0)):
        groups[f"teacher {kind}"] = [{"ece": str(ece), "val_loss": "4"}]
        groups[f"student of {kind}"] = [{"ece": "0", "val_loss": str(loss)}]
    assert rank_correlation(groups, list("abcd"), "ece") == pytest.approx(0.8)


def test_the_experiment_at_toy_size(prepared_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared_folder, tmp_path / "out" / "tiny" / "data")
    scale = dataclasses.replace(TINY, text_final_eval=20, data_shares=(0.5,))
    monkeypatch.setitem(scales.SCALES, "quick", scale)
    monkeypatch.setattr(common, "run_jobs", run_here)
    for name, value in (("TEACHERS", ("plain", "softened")), ("SIZE", "nano"), ("WINDOWS", 20)):
        monkeypatch.setattr(teacher_quality, name, value)
    args = teacher_quality.parse_args(["--preset", "quick", "--results", str(tmp_path / "results")])
    teacher_quality.main(args)
    rows = read_rows(tmp_path / "results" / "teacher_quality" / "results.csv")
    rows = {row["arm"]: row for row in rows}
    plain, softer = rows["teacher plain"], rows["teacher softened"]
    assert len(rows) == 4
    assert float(softer["off_target"]) > float(plain["off_target"]), "it is flatter"
    assert float(softer["separation"]) == pytest.approx(float(plain["separation"]), rel=1e-3)
    (picture,) = plots.draw_all(tmp_path / "results", PICTURES)
    assert plots.plt.imread(picture).std() > 0.05
