"""Whether the kernel took a process away because memory ran out."""

from pathlib import Path

VMSTAT = Path("/proc/vmstat")


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
