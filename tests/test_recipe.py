"""Promise: the recipe goes from a teacher's folder to its table, and does nothing twice."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

from eval.experiments import recipe, recipe_table
from model import ModelConfig, Transformer, load_model, save_model
from tests.conftest import small_text


def in_this_process(words: list[str]) -> int:
    """What the command does, without starting Python again."""
    name, *rest = words[1:] if words[0] == "-m" else [words[0].removesuffix(".py"), *words[1:]]
    module = importlib.import_module(name)
    module.main(module.parse_args(rest))
    return 0


@pytest.fixture(scope="module")
def world(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    teacher = ModelConfig.preset("nano", 400)
    save_model(Transformer(teacher), folder / "own", prepared_folder)
    for place in ("field", "other"):
        (folder / place).mkdir()
        for number in range(4):
            text = small_text(number + 10 * (place == "other"), 60)
            (folder / place / f"{number}.txt").write_text(text, "utf-8")
    return folder


def args_of(*words):
    flags = "--teacher own --text field --other other --layers 1 --adapt_steps 2 --steps 2"
    flags += " --seq_len 16 --windows 4 --root out --results results"
    return recipe.parse_args([*flags.split(), *words])


def test_from_a_folder_to_the_table(world, monkeypatch):
    monkeypatch.setattr(recipe_table, "ANSWER", 4)
    monkeypatch.setattr(recipe, "run_command", in_this_process)
    monkeypatch.chdir(world)
    Path("questions.txt").write_text("Who has apples?\n\nHow many?\n", "utf-8")
    words = ("--questions", "questions.txt")
    rows = {row["model"]: row for row in recipe.main(args_of(*words))}
    assert list(rows) == list(recipe.MODELS)
    with open("results/results.csv", newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == list(rows)
    # Trimming conditions on the kept tokens: fewer parameters, and no other weight is touched.
    whole, trimmed = load_model("own"), load_model("out/trimmed")
    assert rows["trimmed"]["parameters"] == trimmed.num_parameters() <= whole.num_parameters()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(whole.get_parameter(name), trimmed.get_parameter(name))
    # Students have one of two layers, and the same number of tokens.
    assert load_model("out/plain").config.num_hidden_layers == 1
    assert rows["plain"]["tokens"] == rows["distilled"]["tokens"] == 2 * 8 * 16
    assert rows["plain, equal seconds"]["tokens"] > 0
    sizes = [rows["plain"][f"{kind}_mb"] for kind in ("bfloat16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    for row in rows.values():
        assert 2 < row["field_loss"] < 8 and 2 < row["other_loss"] < 8 and row["seed"] == 0
        assert abs(row["int8_bits_per_byte"] - row["field_bits_per_byte"]) < 0.05
    text = Path("results/answers.md").read_text("utf-8")
    assert (
        text.count("## ") == 2
        and "## How many?" in text
        and text.count("- distilled: ") == 2
        and "in a chat" in text
    )
    assert "plain, equal seconds" in Path("results/table.md").read_text("utf-8")
    # Once more: nothing is run again; and another command is not taken for the one that ran.
    monkeypatch.setattr(recipe, "run_command", lambda words: pytest.fail(f"{words} ran again"))
    before = Path("out/stages.json").read_bytes()
    recipe.run_stages(Path("out"), args_of())
    assert Path("out/stages.json").read_bytes() == before
    with pytest.raises(ValueError, match="out/distilled was made by another command .*--steps 2"):
        recipe.run_stages(Path("out"), args_of("--steps", "3"))
    # Nor other texts for those of the first call.
    text = Path("field/1.txt").read_text("utf-8")
    Path("field/1.txt").write_text(text + "more", "utf-8")
    with pytest.raises(ValueError, match="out was made from other content: field/1.txt differs"):
        recipe.run_stages(Path("out"), args_of())
    Path("field/1.txt").write_text(text, "utf-8")
    Path("field/9.md").write_text("new", "utf-8")
    with pytest.raises(ValueError, match="out was made from other content: field/9.md differs"):
        recipe.run_stages(Path("out"), args_of())
    Path("field/9.md").unlink()


def test_a_stage_that_fails_ends_the_recipe(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setattr(recipe, "run_command", lambda words: 2)
    root = tmp_path / "out"
    args = recipe.parse_args(["--root", str(root), "--teacher", "own", "--layers", "1"])
    with pytest.raises(ValueError, match="ended with exit code 2"):
        recipe.run_stages(root, args)
    assert recipe.read_json(root / "stages.json") == {}
    # One that was stopped goes on, and its time counts from the beginning.
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: float(next(clock)))
    codes = iter([130, 0, 1])
    monkeypatch.setattr(recipe, "run_command", lambda words: next(codes))
    for code in (130, 1):
        with pytest.raises(ValueError, match=f"ended with exit code {code}"):
            recipe.run_stages(root, args)
    docs, *_ = recipe.read_json(root / "stages.json").values()
    assert (docs["finished"], docs["seconds"]) == (True, 200.0)


@pytest.mark.parametrize("words, message", [
    ("--layers 3", "3 layers cannot be copied from 2: use 1 to 2"),
    ("--root field", "--root field would write where --text field is read: pass another --root"),
    ("--results field", "--results field would write where --text field"),
    ("--root own", "--root own holds files that this command did not make: pass another"),
    ("--results own", "--results own holds files that this command did not make: pass another"),
])  # fmt: skip
def test_what_cannot_work_is_said_before_the_work(words, message, world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(recipe, "run_command", lambda words: pytest.fail(f"{words} ran"))
    args = args_of("--root", "new", "--results", "new/results", *words.split())
    with pytest.raises(ValueError, match=message):
        recipe.main(args)
