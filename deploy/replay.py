"""An image without an engine: the steps of a Dockerfile, run as they stand in a folder of their own.

    python deploy/replay.py api FOLDER --python python3.12 [--arg TORCH=torch==2.13.0+cpu]

Prints the image's entry point, command and variables as JSON; with `--describe` nothing is run for it.
`COPY` copies, `RUN` runs, `ENV` and `ARG` become variables; `/opt`, `/src` and `/wheels` lie below the folder
that is given. What makes users or installs packages of the system is left out: it needs root. A `RUN` is the
recipe's own text, so a step that fails here fails in an image too, but for the libraries of the base image.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("/opt/", "/wheels", "/src")
NEEDS_ROOT = re.compile(r"groupadd|useradd|apt-get")


@dataclass
class Image:
    """What the last stage of a recipe left."""

    folder: Path
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def build(recipe: Path, root: Path, folder: Path, python: Path, arguments: dict[str, str]) -> Image:
    """Runs the stages `build` and `image` of `recipe`; `python` is that of the base image.

    Raises:
        subprocess.CalledProcessError: a step failed; its output is in `folder`/build.log.
    """
    image = Image(folder)
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(python)
    (folder / "src").mkdir()
    for stage, steps in _stages(recipe.read_text()):
        if stage in {"build", "image"}:
            variables: dict[str, str] = {}
            for step, rest in steps:
                _take(step, rest, image, root, variables, arguments)
            if stage == "image":
                image.environment = variables
    return image


def described(recipe: Path) -> Image:
    """What the stage `image` starts, and with which variables; nothing is built."""
    image = Image(Path())
    for step, rest in dict(_stages(recipe.read_text()))["image"]:
        if step not in {"RUN", "COPY"}:
            _take(step, rest, image, ROOT, image.environment, {})
    return image


def _stages(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    stages: list[tuple[str, list[tuple[str, str]]]] = []
    for line in filter(str.strip, joined.splitlines()):
        step, rest = line.split(maxsplit=1)
        if step == "FROM":
            stages.append((rest.split(" AS ")[1], []))
        else:
            stages[-1][1].append((step, rest))
    return stages


def _take(
    step: str, rest: str, image: Image, root: Path, variables: dict[str, str], arguments: dict[str, str]
) -> None:
    if step == "ENV":
        variables |= dict(re.findall(r"(\w+)=(\S*)", rest))
    elif step == "ARG":
        name, _, default = rest.partition("=")
        variables[name] = arguments.get(name, default)
    elif step == "COPY" and "--from" not in rest:
        *sources, target = rest.split()
        for source in sources:
            _copy(root / source, image.folder / "src" / target, whole=target not in {".", "./"})
    elif step == "RUN" and not NEEDS_ROOT.search(rest):
        _run(rest, image.folder, variables)
    elif step == "CMD":
        image.command = json.loads(rest)
    elif step == "ENTRYPOINT":
        image.entrypoint = json.loads(rest)


def _copy(source: Path, target: Path, whole: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target if whole and not target.is_dir() else target.resolve())


def _run(command: str, folder: Path, variables: dict[str, str]) -> None:
    for place in FOLDERS:
        command = re.sub(rf"(?<![\w/.]){place}", f"{folder}{place}", command)
    path = f"{folder}/bin:{os.environ['PATH']}"
    environment = os.environ | variables | {"PATH": path}
    environment.pop("PYTHONPATH", None)
    with (folder / "build.log").open("a") as log:
        log.write(f"+ {command}\n")
        log.flush()
        shell = ["bash", "-euo", "pipefail", "-c", command]
        subprocess.run(shell, cwd=folder / "src", env=environment, stdout=log, stderr=log, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="api, worker, router or teacher-cpu")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="python3.12", help="the base image's Python")
    parser.add_argument("--describe", action="store_true", help="build nothing")
    parser.add_argument("--arg", action="append", default=[], help="NAME=VALUE, as of docker build")
    asked = parser.parse_args()
    python = shutil.which(asked.python) or parser.error(f"there is no {asked.python}")
    arguments = dict(each.split("=", 1) for each in asked.arg)
    recipe = ROOT / f"deploy/docker/{asked.name}.Dockerfile"
    image = (
        described(recipe)
        if asked.describe
        else build(recipe, ROOT, asked.folder.resolve(), Path(python), arguments)
    )
    told = {"entrypoint": image.entrypoint, "command": image.command, "environment": image.environment}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
