"""docker-compose.yml by its schema and by our own rules: no container engine is needed, none is used."""

import re
import shutil
import subprocess
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from recoup_jobs.servability import RANKS
from recoup_jobs.settings import PREFIX, Settings

VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?P<kind>:[-?])(?P<rest>[^}]*)\}")
EXACT_VERSION = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?")
REQUIRED = {"MODELS": "/srv/models", "TEACHER": "teacher"}
WORKERS = {"worker", "worker-single", "worker-turns", "worker-cpu"}
OURS = {"migrate", "api"} | WORKERS
SERVERS = {"serve", "serve-cpu"}
TOGETHER = (
    {"gpu"},
    {"gpu", "gpu-replica", "observability"},
    {"gpu", "gpu-replica", "serve"},
    {"gpu-single"},
    {"gpu-single", "observability"},
    {"gpu-single", "serve"},
    {"gpu-turns"},
    {"cpu"},
    {"cpu", "observability"},
    {"cpu", "serve-cpu"},
)
"""Profiles that make sense together."""


@pytest.fixture(scope="session")
def text(root):
    return (root / "docker-compose.yml").read_text()


@pytest.fixture(scope="session")
def compose(text):
    """The file as Compose sees it where the required variables are set and the others are not."""

    def value(found):
        return REQUIRED[found["name"]] if found["kind"] == ":?" else found["rest"]

    return yaml.safe_load(VARIABLE.sub(value, text))


@pytest.fixture
def services(compose):
    return compose["services"]


@pytest.fixture
def lasting(services):
    """All but the one that does its work and ends."""
    return {name: service for name, service in services.items() if name != "migrate"}


@pytest.fixture
def environments(services):
    return {name: service.get("environment", {}) for name, service in services.items()}


def check_schema(compose):
    PyCompose.from_yaml(yaml.safe_dump(compose)).validate()


def running(services, profiles):
    return {
        name: service
        for name, service in services.items()
        if not service.get("profiles") or profiles & {*service["profiles"]}
    }


def test_the_file_follows_the_compose_specification(compose):
    check_schema(compose)
    assert compose["name"] == "recoup"
    assert "version" not in compose


@pytest.mark.parametrize("mistake", [{"restrat": "always"}, {"networks": ["nowhere"]}])
def test_the_schema_finds_a_mistake(compose, mistake):
    wrong = yaml.safe_load(yaml.safe_dump(compose))
    wrong["services"]["api"].update(mistake)
    with pytest.raises(ValueError, match=r"restrat|nowhere"):
        check_schema(wrong)


def test_every_service_is_unprivileged_on_a_read_only_root(services):
    for name, service in services.items():
        assert re.fullmatch(r"\d+:\d+", service["user"]), name
        assert not service["user"].startswith("0:"), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert not {"privileged", "cap_add", "pid", "ipc", "devices", "network_mode"} & service.keys(), name


def test_every_service_that_lasts_is_watched_and_started_again(lasting):
    for name, service in lasting.items():
        assert service["healthcheck"]["test"], name
        assert service["healthcheck"]["start_period"], name
        assert service["restart"] == "unless-stopped", name


def test_what_ends_is_waited_for_by_those_who_need_it(services):
    assert services["migrate"]["restart"] == "on-failure"
    for name in {"api"} | WORKERS:
        needs = services[name]["depends_on"]
        assert needs["migrate"]["condition"] == "service_completed_successfully", name
        assert needs["valkey"]["condition"] == "service_healthy", name


def test_logs_do_not_fill_the_disk(services):
    assert all(service["logging"]["options"]["max-size"] for service in services.values())


def test_only_the_api_is_published_and_only_on_loopback(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.keys() == {"api"}
    assert all(ip_address(port.split(":")[0]).is_loopback for port in published["api"])


def test_only_the_api_reaches_beyond_the_internal_network(compose, services):
    internal = {name for name, network in compose["networks"].items() if (network or {}).get("internal")}
    beyond = {name for name, service in services.items() if not internal.issuperset(service["networks"])}
    assert beyond == {"api"}


def test_every_image_is_built_here_or_has_an_exact_version(services, dockerfiles):
    images = {service["image"] for service in services.values() if "build" not in service}
    bases = re.findall(r"^FROM (\S+:\S+)", "\n".join(dockerfiles.values()), re.MULTILINE)
    assert bases
    assert [image for image in [*images, *bases] if not EXACT_VERSION.fullmatch(image)] == []


@pytest.mark.parametrize("profiles", TOGETHER)
def test_no_two_services_that_run_together_share_a_gpu(services, profiles):
    wanted = [service["deploy"] for service in running(services, profiles).values() if "deploy" in service]
    devices = [device for deploy in wanted for device in deploy["resources"]["reservations"]["devices"]]
    gpus = [gpu for device in devices for gpu in device["device_ids"]]
    assert len(set(gpus)) == len(gpus)
    assert bool(gpus) == ("cpu" not in profiles)


@pytest.mark.parametrize("profiles", TOGETHER)
def test_a_choice_of_profiles_has_one_worker_and_all_that_it_needs(services, profiles):
    found = running(services, profiles)
    assert len(found.keys() & WORKERS) == 1
    for service in found.values():
        assert service.get("depends_on", {}).keys() <= found.keys()


@pytest.mark.parametrize("worker", sorted(WORKERS))
def test_a_worker_asks_a_teacher_that_runs_with_it(services, environments, worker):
    named = re.findall(r"http://([\w-]+):8000", environments[worker]["RECOUP_VLLM_URLS"])
    assert set(named) <= services[worker]["depends_on"].keys()
    assert bool(named) == (worker not in {"worker-single", "worker-turns"})


def test_a_worker_that_takes_turns_with_vllm_has_it_in_its_image(services, environments, dockerfiles):
    given = environments["worker-turns"]
    assert (given["RECOUP_VLLM_IN_TURNS"], given["RECOUP_VLLM_URLS"]) == ("true", "")
    assert services["worker-turns"]["build"]["args"]["VLLM"] == "cuda"
    place = Path(given["RECOUP_VLLM_PYTHON"]).parents[1]
    assert f"COPY --from=build {place} {place}" in dockerfiles["worker"]


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_a_server_of_recovered_models_reads_what_the_api_lays_out(services, environments, name, monkeypatch):
    monkeypatch.setenv("RECOUP_HOME", environments["api"]["RECOUP_HOME"])
    place = Settings().deployments_dir
    assert f"deployments:{place}" in services["api"]["volumes"]
    assert services[name]["volumes"] == ["/srv/models:/models:ro", f"deployments:{place}:ro"]
    assert environments[name]["VLLM_LORA_RESOLVER_CACHE_DIR"] == str(place)
    assert environments[name]["VLLM_PLUGINS"] == "lora_filesystem_resolver"
    assert services[name]["depends_on"] == {"api": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_a_server_of_recovered_models_is_asked_by_the_api_and_has_room_for_adapters(
    services, environments, name
):
    (host,) = re.findall(r"http://([\w-]+):8000", environments["api"]["RECOUP_SERVE_URLS"])
    assert services[name]["networks"] == {"inside": {"aliases": [host]}}
    model, served, *flags = services[name]["command"]
    assert (model.removeprefix("--model="), served) == ("/models/student", "--served-model-name=student")
    assert "--enable-lora" in flags
    (rank,) = [flag for flag in flags if flag.startswith("--max-lora-rank=")]
    assert int(rank.partition("=")[2]) in RANKS


@pytest.mark.parametrize("name", ["vllm", "vllm-replica", "serve", "vllm-cpu", "serve-cpu"])
def test_a_vllm_is_told_its_model_as_its_image_takes_it(services, dockerfiles, name):
    """Under its own name, where the module is started: it passes over a bare word without a sound."""
    by_module = '"-m", "vllm.entrypoints' in dockerfiles["teacher-cpu"]
    named = services[name]["command"][0].startswith("--model=")
    assert named == (by_module and "build" in services[name])


def test_every_variable_of_ours_is_a_setting(environments):
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    given = {key for values in environments.values() for key in values if key.startswith(PREFIX)}
    assert given <= known
    others = environments.keys() - OURS
    assert all(not key.startswith(PREFIX) for name in others for key in environments[name])


@pytest.fixture
def secrets(compose, root, tmp_path):
    """What deploy/secrets.sh makes, by name."""
    script = tmp_path / "deploy/secrets.sh"
    script.parent.mkdir()
    script.write_text((root / "deploy/secrets.sh").read_text())
    subprocess.run(["bash", script], check=True, capture_output=True)
    made = {path.name: path for path in (tmp_path / "deploy/secrets").iterdir()}
    subprocess.run(["bash", script], check=True, capture_output=True)  # again: nothing changes
    return made


def test_every_secret_is_a_file_that_the_script_makes(compose, secrets):
    named = {name: secret["file"] for name, secret in compose["secrets"].items()}
    assert named == {name: f"deploy/secrets/{name}" for name in secrets}
    for path in secrets.values():
        assert len(path.read_text().strip()) >= 32
        assert path.stat().st_mode & 0o777 == 0o444
    assert secrets["valkey_acl"].parent.stat().st_mode & 0o777 == 0o700


def test_no_password_stands_in_the_file_or_in_an_environment(text, environments, secrets):
    for values in environments.values():
        for key in values:
            assert not re.search(r"PASSWORD|_KEY|TOKEN", key) or key.endswith("FILE")
    assert not any(path.read_text().strip() in text for path in secrets.values())


@pytest.mark.parametrize("service", sorted(OURS))
def test_a_service_reads_its_settings_from_variables_and_secrets(
    services, environments, secrets, service, monkeypatch, tmp_path
):
    mounted = tmp_path / "run"
    mounted.mkdir()
    for name in services[service]["secrets"]:
        shutil.copy(secrets[name], mounted)
    for key, value in environments[service].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RECOUP_SECRETS_DIR", str(mounted))
    settings = Settings()
    password = secrets["postgres_password"].read_text()
    assert settings.database_url == f"postgresql+psycopg://recoup:{password}@postgres:5432/recoup"
    assert (settings.broker_url or "").endswith("@valkey:6379/0") == (service != "migrate")
    assert (settings.api_key is not None) == (service == "api")
    assert settings.log_format == "json"
    assert (settings.metrics_listen is not None) == (service in WORKERS)


def test_the_brokers_user_may_do_what_the_queue_needs_and_no_more(secrets):
    default, ours = secrets["valkey_acl"].read_text().splitlines()
    assert default == "user default off"
    words = ours.split()
    assert words[:3] == ["user", "recoup", "on"]
    assert "~recoup:*" in words and "~*" not in words
    assert {"-@admin", "-@dangerous"} <= {*words}


def test_api_and_workers_share_the_home_and_only_read_the_models(services, environments):
    for name in {"api"} | WORKERS:
        assert f"home:{environments[name]['RECOUP_HOME']}" in services[name]["volumes"]
        assert f"/srv/models:{environments[name]['RECOUP_MODEL_ROOTS']}:ro" in services[name]["volumes"]


def test_a_runner_has_its_grace_before_the_worker_is_killed(services):
    for name in WORKERS:
        minutes = re.fullmatch(r"(\d+)m", services[name]["stop_grace_period"])
        assert int(minutes[1]) * 60 > 2 * Settings.model_fields["grace_seconds"].default


def test_prometheus_asks_names_and_ports_that_exist(services, root):
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    aliases = set()
    for name, service in services.items():
        networks = service["networks"]
        aliases |= {name} | ({*networks["inside"]["aliases"]} if isinstance(networks, dict) else set())
    for job in config["scrape_configs"]:
        hosts = [name for found in job.get("dns_sd_configs", []) for name in found["names"]]
        hosts += [t.split(":")[0] for found in job.get("static_configs", []) for t in found["targets"]]
        assert hosts and {*hosts} <= aliases


@pytest.fixture
def example(root):
    """.env.example: name -> (value, whether it is only shown)."""
    lines = re.findall(r"^(# )?([A-Z_]+)=(.*)$", (root / ".env.example").read_text(), re.MULTILINE)
    assert len({name for _, name, _ in lines}) == len(lines)
    return {name: (value, bool(shown)) for shown, name, value in lines}


def test_the_example_environment_names_every_variable_and_every_setting(text, example):
    settings = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    variables = {found["name"] for found in VARIABLE.finditer(text)} | {"COMPOSE_PROFILES"}
    assert example.keys() == settings | variables
    assert {name for name, (_, shown) in example.items() if not shown} == {
        "COMPOSE_PROFILES",
        "RECOUP_QUEUE",
        *REQUIRED,
    }


def test_the_example_shows_the_real_defaults(example, monkeypatch):
    default = Settings()
    for name in Settings.model_fields.keys() - {"queue"}:
        shown, _ = example[f"{PREFIX}{name.upper()}"]
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", shown)
    assert Settings() == default


def test_every_line_of_the_example_is_explained(root):
    blocks = (root / ".env.example").read_text().split("\n")
    for above, line in pairwise(blocks):
        if re.match(r"(# )?[A-Z_]+=", line):
            assert above.startswith("# "), line


def test_vllm_is_the_same_release_with_and_without_a_container(services, root):
    pinned = re.search(r"^vllm==(\S+)$", (root / "deploy/vllm/requirements.txt").read_text(), re.MULTILINE)
    assert services["vllm"]["image"] == f"vllm/vllm-openai:v{pinned[1]}"
    assert services["vllm-replica"]["image"] == services["serve"]["image"] == services["vllm"]["image"]
