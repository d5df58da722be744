"""`python -m recoup_server.guarded COMMAND …`: a command, and the end of everything that it started.

For programs of others that have children of their own, as vLLM has its engine: they ask nobody
whether the launcher still lives, and an engine left over holds its memory. This process leads
their group, and ends it when its standard input, a pipe of the launcher's, is closed.
"""

import signal
import subprocess
import sys

from recoup_jobs.processes import die_with_stdin


def main() -> int:
    """Runs the command and ends with its exit code; SIGTERM is handed on to it."""
    die_with_stdin()
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
