"""Who may import whom: the contracts of pyproject.toml, and what really gets loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LINT = "import importlinter.cli as cli; raise SystemExit(cli.lint_imports(no_cache=True, no_logo=True))"


def in_a_fresh_interpreter(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)


def loaded_by(*modules):
    """The top-level names that stand in `sys.modules` once these modules are imported."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = in_a_fresh_interpreter(code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.slow  # `make lint` reads the same contracts
def test_imports_go_downwards_only():
    done = in_a_fresh_interpreter(LINT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "modules",
    [
        ("recoup_api.app", "recoup_jobs.preflight", "recoup_jobs.datasets", "recoup_jobs.artifacts"),
        ("recoup_server.cli", "recoup_server.embedded"),
        ("recoup_worker.main", "recoup_worker.runner"),
    ],
)
def test_torch_is_loaded_by_nothing_but_the_science(modules):
    assert loaded_by(*modules).isdisjoint({"torch", "transformers", "peft", "accelerate", "lm_eval"})


def test_the_science_loads_no_web_queue_or_database():
    """Redis aside: torch's compiler, which peft reaches through bitsandbytes, looks for a Redis cache."""
    loaded = loaded_by("recoup_ml.recipe")
    assert "torch" in loaded
    assert loaded.isdisjoint({"celery", "kombu", "fastapi", "starlette", "uvicorn", "sqlalchemy"})
