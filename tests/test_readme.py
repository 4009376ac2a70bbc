"""README and docs stay true: their commands are accepted, their links lead somewhere, and what
lessons and methods say about running them is accepted too."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from eval.experiments.common import preset_args

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = [*(p for p in PAGES if p.name != "LOG.md")]  # a log has commands of its time
FILES += [*sorted(ROOT.glob("train_*.py")), *sorted((ROOT / "methods").glob("*.py"))]
OURS = r"((?:train_|dataset|eval|methods|bench)[\w.]*)"
COMMAND = re.compile(rf"(?:^ *|`|&& )python (?:-m )?{OURS}(.*)")


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(module, words) of every command of ours in a file, up to a comment; continued lines are
    joined."""
    found = []
    for line in path.read_text("utf-8").replace("\\\n", " ").splitlines():
        for name, words in COMMAND.findall(line):
            words = re.split(r"`|  |#|&&", words)[0]
            found.append((name.removesuffix(".py"), shlex.split(words)))
    return found


def test_there_are_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 15
    assert ("eval.reproduce", []) in commands(ROOT / "README.md")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_are_accepted(path, capsys):
    for module, words in commands(path):
        parse_args = getattr(importlib.import_module(module), "parse_args", None)
        try:
            parse_args(words) if parse_args else preset_args("", words)  # one experiment alone
        except SystemExit as stop:
            pytest.fail(f"{module} {' '.join(words)}: {stop} {capsys.readouterr().err}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_first_page_stays_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
