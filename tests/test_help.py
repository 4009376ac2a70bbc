"""--help of every command: each default and each range is shown, and each range is kept."""

import argparse
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
COMMANDS = sorted(
    name.removesuffix(".py").replace("/", ".")
    for name in FILES
    if not name.startswith("tests/") and '__name__ == "__main__"' in (ROOT / name).read_text()
)
NUMBER = r"([0-9.,]+(?:e[+-][0-9]+)?)"


def parser_of(command: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that `python -m command` makes."""

    class Made(Exception):
        pass

    def keep(self, *_):
        raise Made(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        patch.setattr(sys, "argv", [command])
        patch.delitem(sys.modules, command, raising=False)
        with pytest.raises(Made) as made:
            runpy.run_module(command, run_name="__main__")
    return made.value.args[0]


def shown(parser: argparse.ArgumentParser, monkeypatch) -> dict[str, str]:
    """What --help says of each flag."""
    monkeypatch.setenv("COLUMNS", "1000")
    _, *entries = re.split(r"\n  (?=--?[a-z])", parser.format_help())
    return {re.findall(r"--([a-z0-9_]+)", entry)[0]: " ".join(entry.split()) for entry in entries}


def test_the_list_of_commands_is_not_empty():
    some = {"train_pretrain", "dataset.prepare", "eval.experiments.alpha", "bench.costs"}
    assert some < set(COMMANDS) and len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default_and_range(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    helps = shown(parser, monkeypatch)
    flags = [a for a in parser._actions if a.dest != "help"]
    assert helps.keys() == {"help", *(a.option_strings[0].lstrip("-") for a in flags)}
    for action in flags:
        said = helps[action.dest]
        if action.nargs == 0:
            assert f"default {'on' if action.default else 'off'}]" in said
        elif action.default is not None:
            assert f"default {action.default}]" in said
        if action.type in (int, float):
            assert re.search(rf"\[{NUMBER} to {NUMBER}", said), said
        for word in (r"\b[0-9]+ on\b", r"\bwhich\b", r"[0-9]\+"):
            assert not re.search(word, said), said


NUMERIC = [name for name in COMMANDS if "experiments" not in name and name != "eval.reproduce"]


@pytest.mark.parametrize("command", NUMERIC)
def test_the_ranges_shown_are_those_that_are_kept(command, monkeypatch, tmp_path):
    """A value beyond either end is refused by name, before anything is read or written."""
    module = importlib.import_module(command)
    helps = shown(parser_of(command, monkeypatch), monkeypatch)
    monkeypatch.chdir(tmp_path)
    more = ["--student", "nano"] if command == "train_distill_reason" else []
    for name, said in helps.items():
        if ends := re.search(rf"\[{NUMBER} to {NUMBER}", said):
            low, high = (float(end.replace(",", "")) for end in ends.groups())
            for value in (low - 1, 2 * high):
                whole = not re.search(r"default [0-9]+\.", said) and value == int(value)
                given = f"{value:.0f}" if whole else f"{value:g}"
                args = module.parse_args([f"--{name}={given}", *more])
                with pytest.raises(ValueError, match=f"^--{name} .* must be between "):
                    module.main(args)
    assert not list(tmp_path.iterdir())
