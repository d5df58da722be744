"""The SDK as a distribution: what it imports, what is in its wheel, and what it needs."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import recoup

CLIENTS = Path(recoup.__file__).parents[1]
FOREIGN = ("torch", "transformers", "fastapi", "celery", "redis", "sqlalchemy")
SERVICE = ("recoup_api", "recoup_jobs", "recoup_ml", "recoup_server", "recoup_worker")


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(python(sys.executable, code).stdout.splitlines()[-1].split())


def python(
    executable: str | Path, code: str, path: Path | None = CLIENTS
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [executable, "-c", code], check=False, capture_output=True, text=True, env=environment, timeout=60
    )


def test_importing_recoup_loads_pydantic_alone():
    loaded = modules_after("import recoup")
    assert "pydantic" in loaded
    assert loaded.isdisjoint({"typer", "rich", "httpx2", *FOREIGN})


def test_the_client_loads_the_http_library_and_no_terminal():
    loaded = modules_after("from recoup import AsyncClient, Client; AsyncClient(), Client().close()")
    assert "httpx2" in loaded
    assert loaded.isdisjoint({"typer", "rich", *FOREIGN})


def test_importing_the_clients_loads_nothing_that_pydantic_and_the_http_library_do_not():
    ours = modules_after("from recoup import AsyncClient, Client")
    theirs = modules_after("from pydantic import BaseModel, Field, create_model; import httpx2")
    assert ours - theirs - sys.stdlib_module_names == {"recoup"}
    assert "asyncio" not in ours


def test_importing_the_clients_loads_no_schema_and_every_schema_can_be_had():
    code = "import sys\nfrom recoup import AsyncClient, Client, schemas\n"
    code += "print(*[name for name in sys.modules if name.startswith('recoup.schemas.')])\n"
    code += "print(*[name for name in schemas.__all__ if not hasattr(schemas, name)])\n"
    code += "print(*set(schemas.__all__) ^ set(schemas._HOME))"
    assert python(sys.executable, code).stdout == "\n\n\n"


def test_help_does_not_load_the_http_library():
    ask = "import sys, recoup.cli; sys.argv = ['recoup', '--help']"
    loaded = modules_after(f"{ask}\ntry: recoup.cli.main()\nexcept SystemExit: pass")
    assert "typer" in loaded
    assert "httpx2" not in loaded


def test_all_public_names_are_there():
    assert [name for name in recoup.__all__ if not hasattr(recoup, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        recoup.Cleint


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy of the sources."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, and a build may not download it")
    source, out = tmp_path_factory.mktemp("source") / "clients", tmp_path_factory.mktemp("dist")
    shutil.copytree(CLIENTS, source, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=60)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with the wheel, what its metadata requires, and nothing else."""
    if find_spec("pip") is None:
        pytest.skip("pip is not installed, so there is nothing to install the wheel with")
    home = tmp_path_factory.mktemp("home") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    executable = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--disable-pip-version-check", str(wheel)], check=True, capture_output=True, timeout=60
    )
    (site,) = home.glob("lib/python*/site-packages")
    for entry in entries(closure(requirements(metadata(wheel).get_all("Requires-Dist")))):
        (site / entry.name).symlink_to(entry)
    return executable


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def requirements(lines: list[str] | None) -> set[str]:
    """Names of the distributions that are always required: those of an extra are not."""
    always = [line for line in lines or () if "extra ==" not in line]
    return {re.match(r"[A-Za-z0-9._-]+", line)[0] for line in always}


def closure(names: set[str]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions of these names, and all that they require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        if name not in found and (here := [*importlib.metadata.distributions(name=name)]):
            found[name] = here[0]
            waiting += requirements(here[0].requires)
    return found


def entries(distributions: dict[str, importlib.metadata.Distribution]) -> set[Path]:
    """What these distributions put into the top of site-packages."""
    return {
        Path(distribution.locate_file(file.parts[0]))
        for distribution in distributions.values()
        for file in distribution.files
        if file.parts[0] not in {"..", "__pycache__"}
    }


def test_the_wheel_holds_the_package_recoup_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"recoup", f"recoup-{recoup.__version__}.dist-info"}
    assert {"recoup/py.typed", "recoup/schemas/__init__.py", "recoup/client.py"} <= {*names}


def test_the_wheel_requires_pydantic_and_httpx2_alone(wheel):
    described = metadata(wheel)
    assert (described["Name"], described["Version"]) == ("recoup", recoup.__version__)
    assert requirements(described.get_all("Requires-Dist")) == {"pydantic", "httpx2"}
    assert described.get_all("Provides-Extra") == ["cli"]


def test_in_a_fresh_environment_the_client_works_and_the_service_is_not_there(installed):
    absent = (*FOREIGN, *SERVICE, "typer", "rich", "pytest")
    code = "import json; from importlib.util import find_spec; from recoup import Client, __file__\n"
    code += "Client().close()\n"
    code += f"print(json.dumps([__file__, [name for name in {absent!r} if find_spec(name)]]))"
    result = python(installed, code, path=None)
    assert result.returncode == 0, result.stderr
    file, found = json.loads(result.stdout)
    assert Path(file).is_relative_to(installed.parents[1])
    assert found == []


def readme_program() -> str:
    """The README's first Python block."""
    text = (CLIENTS / "README.md").read_text(encoding="utf-8")
    return text.split("```python\n", 2)[1].split("```")[0]


def test_in_a_fresh_environment_the_readmes_program_runs(installed, service, tmp_path):
    (tmp_path / "general.jsonl").write_text('{"prompt": "What is a tide?"}\n', encoding="utf-8")
    environment = {"RECOUP_BASE_URL": service.url, "PATH": os.environ["PATH"]}
    result = subprocess.run(
        [installed, "-c", readme_program()],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "recovered" in result.stdout
    assert {path.name for path in (tmp_path / "restored").rglob("*") if path.is_file()} == {
        "weights.safetensors",
        "report.json",
    }


def test_without_the_extra_the_command_says_how_to_get_it(installed):
    command = [installed.parent / "recoup", "--help"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "The command line needs typer: pip install 'recoup[cli]'\n"
