"""Tasks of lm-evaluation-harness: the operator's files, found by name.

Such a file may name Python functions, which run in the worker: a request can therefore only choose among
those in the operator's folder. What is in a file is not looked at here; that needs the harness itself.
"""

from pathlib import Path

from recoup_jobs.errors import Unprocessable


def task_file(folder: Path | None, name: str) -> Path:
    """The file of a task, or raises `Unprocessable`."""
    if folder is None:
        message = "this server has no tasks of lm-evaluation-harness; its operator sets RECOUP_HARNESS_TASKS"
        raise Unprocessable("harness_task_not_found", message)
    file = folder / f"{name}.yaml"
    if not file.is_file():
        message = f"the operator's folder of lm-evaluation-harness tasks has no {file.name}"
        raise Unprocessable("harness_task_not_found", message)
    return file
