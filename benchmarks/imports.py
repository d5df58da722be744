"""What importing the SDK costs, beside importing pydantic and its HTTP library alone.

    python benchmarks/imports.py [ROUNDS]

CPU time (user and system) of a fresh interpreter, with bytecode cached; the statements take turns, and the
least of each counts, since whatever else the machine does can only add to it. A line gives the milliseconds,
and its ratio to the baseline. `import recoup` alone loads no HTTP library.
"""

import os
import resource
import subprocess
import sys

BASELINE = "from pydantic import BaseModel; import httpx2"
STATEMENTS = (
    BASELINE,
    "import recoup",
    "from recoup import AsyncClient, Client",
)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    least = cpu_seconds(STATEMENTS, rounds)
    for statement, seconds in least.items():
        print(f"{seconds * 1000:7.1f} ms  {seconds / least[BASELINE]:4.2f}x  {statement}")


def cpu_seconds(statements: tuple[str, ...], rounds: int) -> dict[str, float]:
    """The least CPU time of a fresh interpreter that runs each statement."""
    least = dict.fromkeys(statements, float("inf"))
    for _ in range(rounds):
        for statement in statements:
            least[statement] = min(least[statement], _once(statement))
    return least


def _once(statement: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
