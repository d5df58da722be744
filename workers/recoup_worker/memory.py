"""How much memory a runner has for itself, and whether the kernel took a process away because it ran out."""

import os
import subprocess
from pathlib import Path

VMSTAT = Path("/proc/vmstat")


NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
SMI_SECONDS = 30.0


def device_memory_bytes() -> int:
    """Of the largest GPU or, where none answers, of the machine."""
    try:
        told = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
        return max(int(line) for line in told.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def oom_kills() -> int:
    """How many processes of this machine the kernel's out-of-memory killer has ended since it started.

    A runner that ended by SIGKILL while this number grew was one of them, or fell beside one;
    0 where the kernel does not count.
    """
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
