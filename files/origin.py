"""Where a result comes from: the commit of this code."""

import subprocess
from pathlib import Path


def git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def git_state() -> dict:
    """The commit of this code, and whether files differ from it; None without git."""
    status = git("status", "--porcelain", "--untracked-files=no")
    dirty = None if status is None else bool(status)
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}
