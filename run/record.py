"""What run.json says of a run's origin: the commit of this code, and the device."""

import platform
import subprocess
from pathlib import Path

import torch


def git_state() -> dict:
    """The commit of this code, and whether files differ from it; None without git."""

    def git(*words):
        try:
            result = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    dirty = None if status is None else bool(status)
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}


def describe_device(device: torch.device) -> str:
    """The name of the GPU, or of the processor and the number of its cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"
