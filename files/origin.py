"""Where a result comes from: the commit of this code."""

import subprocess
from pathlib import Path


def git_state() -> dict:
    """The commit of this code, and whether tracked files differ from it; None without git."""
    ask = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.check_output([*ask, "--exclude=*"], stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
    commit, _, dirty = found.strip().partition("-")
    return {"git_commit": commit, "git_dirty": bool(dirty)}
