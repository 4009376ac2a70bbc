"""speedrun.sh holds what `python -m eval.reproduce` runs for its story, command by command."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from eval import chat, reproduce
from eval import reasoning as eval_reasoning
from eval.experiments import common, headline, reasoning
from eval.experiments.jobs import Job, Spent
from eval.experiments.scales import QUICK
from files import write_json

ROOT = Path(__file__).parent.parent
SPEEDRUN = ROOT / "speedrun.sh"
AFTERWARDS = {"eval.chat": chat, "eval.reasoning": eval_reasoning, "eval.reproduce": reproduce}


def written_commands() -> list[str]:
    """The python commands of speedrun.sh; continued lines are joined."""
    text = SPEEDRUN.read_text("utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:.* \| )?(python (?:-m |train_).*)$", text, re.MULTILINE)
    return [" ".join(command.split()) for command in found]


def command_of(job: Job) -> str:
    """Job.command; what a budget is, where other runs decide it, is asked of those in the shell."""
    spent = [value for _, value in job.flags if isinstance(value, Spent)]
    marked = [(name, "COST" if isinstance(value, Spent) else value) for name, value in job.flags]
    command = Job(job.script, job.out, tuple(marked)).command
    for value in spent:
        runs = " ".join(run.out for run in value.runs)
        command = command.replace("COST", f"$(cost {value.column} {runs})", 1)
    return command


def story() -> list[str]:
    """One command a run, those first that others need."""
    jobs = [
        job_of(0)
        for experiment in (headline.experiment(QUICK), reasoning.experiment(QUICK))
        for _, job_of in experiment.arms
    ]

    def with_needs(job: Job) -> list[Job]:
        return [*(first for need in job.needs for first in with_needs(need)), job]

    return [command_of(job) for job in dict.fromkeys(x for job in jobs for x in with_needs(job))]


def preparation(tmp_path, monkeypatch, capsys) -> list[str]:
    """What reproduce prints before it prepares the data, which it then does not do here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.prepare, "main", lambda args: None)
    capsys.readouterr()
    common.prepare_data(QUICK)
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def test_the_file_is_what_reproduce_runs(tmp_path, monkeypatch, capsys):
    expected = [*preparation(tmp_path, monkeypatch, capsys), *story()]
    found = [command for command in written_commands() if "-m eval." not in command]
    assert found == expected, "the commands of speedrun.sh should be:\n" + "\n".join(expected)


def test_what_follows_looks_at_its_runs():
    """Each of the last commands is one that its script accepts, on a folder that was made."""
    made = story()
    for command in (command for command in written_commands() if "-m eval." in command):
        module, *words = shlex.split(command)[2:]
        args = AFTERWARDS[module].parse_args(words)
        if module != "eval.reproduce":
            assert any(line.endswith(f"--out {args.model}") for line in made), args.model


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_shell_adds_costs_as_a_sweep_does(tmp_path):
    runs = [Job("train_pretrain", str(tmp_path / name), ()) for name in ("a", "b")]
    for run, seconds in zip(runs, (12.34, 1234.5678), strict=True):
        write_json(Path(run.out) / "run.json", {"seconds": seconds, "args": {}})
    function = re.search(r"^cost\(\) \{.*?^\}", SPEEDRUN.read_text("utf-8"), re.M | re.S)[0]
    script = f"{function}\ncost seconds {runs[0].out} {runs[1].out}"
    result = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(Spent("seconds", tuple(runs)).total()) == "1246.91"
