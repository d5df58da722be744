"""docker-compose.yml by its schema and by our own rules: no container engine is needed, none is used."""

import re
import tomllib
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from recoup_jobs.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+):(?P<kind>[-?])(?P<rest>[^}]*)\}")
EXACT_VERSION = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?")
SECRETS = {"RECOUP_API_KEY": "a-key", "POSTGRES_PASSWORD": "p-word", "VALKEY_PASSWORD": "v-word"}
REQUIRED = SECRETS | {"MODELS": "/srv/models", "TEACHER": "teacher"}


@pytest.fixture
def text():
    return (ROOT / "docker-compose.yml").read_text()


@pytest.fixture
def compose(text):
    """The file as Compose sees it where the required variables are set and the others are not."""

    def value(found):
        return REQUIRED[found["name"]] if found["kind"] == "?" else found["rest"]

    return yaml.safe_load(VARIABLE.sub(value, text))


@pytest.fixture
def services(compose):
    return compose["services"]


@pytest.fixture
def dockerfiles(services):
    builds = {name: service["build"] for name, service in services.items() if "build" in service}
    return {name: (ROOT / build["dockerfile"]).read_text() for name, build in builds.items()}


@pytest.fixture
def variables(services):
    """The RECOUP_… variables that each service is given."""
    return {
        name: {key: value for key, value in service["environment"].items() if key.startswith(PREFIX)}
        for name, service in services.items()
    }


def check_schema(compose):
    PyCompose.from_yaml(yaml.safe_dump(compose)).validate()


def test_the_file_follows_the_compose_specification(compose):
    check_schema(compose)
    assert compose["name"] == "recoup"
    assert "version" not in compose


@pytest.mark.parametrize("mistake", [{"restrat": "always"}, {"networks": ["nowhere"]}])
def test_the_schema_finds_a_mistake(compose, mistake):
    compose["services"]["api"].update(mistake)
    with pytest.raises(ValueError, match=r"restrat|nowhere"):
        check_schema(compose)


def test_only_the_api_is_published_and_only_on_loopback(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.keys() == {"api"}
    assert all(ip_address(port.split(":")[0]).is_loopback for port in published["api"])


def test_only_the_api_reaches_beyond_the_internal_network(compose, services):
    internal = {name for name, network in compose["networks"].items() if (network or {}).get("internal")}
    beyond = {name for name, service in services.items() if not internal.issuperset(service["networks"])}
    assert beyond == {"api"}
    assert not any("network_mode" in service for service in services.values())


def test_every_service_is_watched_and_started_again(services):
    assert all(service["healthcheck"]["test"] for service in services.values())
    assert {service["restart"] for service in services.values()} == {"unless-stopped"}


def test_every_image_is_built_here_or_has_an_exact_version(services, dockerfiles):
    images = [service["image"] for name, service in services.items() if name not in dockerfiles]
    bases = re.findall(r"^FROM (\S+)", "\n".join(dockerfiles.values()), re.MULTILINE)
    assert bases
    assert [image for image in [*images, *bases] if not EXACT_VERSION.fullmatch(image)] == []


def test_no_two_services_share_a_gpu(services):
    wanted = [service["deploy"]["resources"] for service in services.values() if "deploy" in service]
    devices = [device for resources in wanted for device in resources["reservations"]["devices"]]
    gpus = [gpu for device in devices for gpu in device["device_ids"]]
    assert len(gpus) == 2
    assert len(set(gpus)) == len(gpus)


def test_every_recoup_variable_is_a_setting(variables):
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert {key for given in variables.values() for key in given} <= known


@pytest.mark.parametrize("service", ["api", "worker"])
def test_the_settings_can_be_read(variables, service, monkeypatch):
    for key, value in variables[service].items():
        monkeypatch.setenv(key, value)
    settings = Settings()
    assert settings.database_url == "postgresql+psycopg://recoup:p-word@postgres:5432/recoup"
    assert settings.broker_url == "redis://:v-word@valkey:6379/0"


def test_api_and_worker_differ_in_the_key_and_the_teacher_alone(variables):
    differing = dict(variables["api"].items() ^ variables["worker"].items())
    assert differing.keys() == {"RECOUP_API_KEY", "RECOUP_VLLM_URLS"}


def test_api_and_worker_share_the_home_and_only_read_the_models(services):
    for name in ("api", "worker"):
        settings = services[name]["environment"]
        assert f"home:{settings['RECOUP_HOME']}" in services[name]["volumes"]
        assert f"/srv/models:{settings['RECOUP_MODEL_ROOTS']}:ro" in services[name]["volumes"]


def test_secrets_are_required_and_come_from_outside(text):
    required = {found["name"] for found in VARIABLE.finditer(text) if found["kind"] == "?"}
    assert required == REQUIRED.keys()
    written = re.findall(r"(?:PASSWORD: |API_KEY: |requirepass |://\w*:(?=.*@))(\S)", text)
    assert set(written) == {"$"}


def test_the_example_environment_names_every_variable_and_no_secret(text):
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert example.keys() == {found["name"] for found in VARIABLE.finditer(text)}
    assert {example[name] for name in SECRETS} == {""}


def test_a_runner_has_its_grace_before_the_worker_is_killed(services):
    minutes = re.fullmatch(r"(\d+)m", services["worker"]["stop_grace_period"])
    assert int(minutes[1]) * 60 > 2 * Settings.model_fields["grace_seconds"].default


def test_our_images_run_unprivileged_on_a_read_only_root(services, dockerfiles):
    assert dockerfiles.keys() == {"api", "worker"}
    for name, dockerfile in dockerfiles.items():
        assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE) == ["10001:10001"]
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]


def test_the_images_install_extras_that_exist_and_the_api_no_torch(dockerfiles):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: set(re.search(r"pip install .*'\.\[([\w,]+)\]'", text)[1].split(","))
        for name, text in dockerfiles.items()
    }
    assert extras == {"api": {"postgres", "s3"}, "worker": {"postgres", "s3", "worker"}}
    assert extras["worker"] <= project["optional-dependencies"].keys()


def test_what_the_images_copy_is_in_the_repository_and_not_ignored(dockerfiles):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for dockerfile in dockerfiles.values():
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


def test_vllm_is_the_same_release_with_and_without_a_container(services):
    pinned = re.search(r"^vllm==(\S+)$", (ROOT / "deploy/vllm/requirements.txt").read_text(), re.MULTILINE)
    assert services["vllm"]["image"] == f"vllm/vllm-openai:v{pinned[1]}"
