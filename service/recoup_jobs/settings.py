"""The one place that reads the environment.

`Settings` is built once by whoever starts a process; below it everything takes plain
arguments. A child process reads the same values from `environment()`.
"""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

PREFIX = "RECOUP_"
BUCKET = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?$"

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Gpu = Annotated[str, Field(pattern=r"^([0-9]{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,100})$")]
"""As CUDA_VISIBLE_DEVICES names it."""


class Alias(BaseModel):
    """What a model's name stands for, to code that was written for OpenAI's fine-tuning API."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    teacher: str | None = None
    """None: the model is healthy, and is taught."""
    method: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        return self.student, self.teacher or self.student


class Settings(BaseSettings):
    """What an installation is made of; each field is read from `RECOUP_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", validate_default=True
    )

    secrets_dir: Path | None = None
    """A folder of files, each named as a variable in small letters and holding its value: where Docker and
    Kubernetes put secrets. A variable wins over a file."""
    home: Path = Path("~/.recoup")
    """Everything that is kept on disk lies below this folder."""
    database_url: Annotated[str | None, Field(repr=False)] = None
    """The ledger, SQLite or PostgreSQL; default: `ledger.db` below `home`."""
    broker_url: Annotated[str | None, Field(repr=False)] = None
    """Redis or Valkey; without it nobody publishes hints."""
    artifacts_url: Annotated[str | None, Field(pattern=BUCKET)] = None
    """Where what recoveries publish is kept: `s3://bucket/prefix`; default: `artifacts` below `home`."""
    artifacts_endpoint: Annotated[str | None, Field(pattern=r"^https?://[^\s/@]+/?$")] = None
    """The server of that bucket, if it is not Amazon's: `https://host:port`."""
    vllm_urls: Annotated[list[str], NoDecode] = []
    """Servers of the same teacher, comma separated."""
    rollout_urls: Annotated[list[str], NoDecode] = []
    """vLLM servers of students, which answer for one that learns from its own answers, comma separated."""
    serve_urls: Annotated[list[str], NoDecode] = []
    """Servers of students, on which deployments are placed, comma separated; `unix:PATH` names a socket."""
    vllm_python: Path | None = None
    """The Python of the environment that holds vLLM, for `recoup-server teacher`."""
    vllm_in_turns: bool = False
    """A worker starts that vLLM for the stages that ask the teacher, and stops it before it loads a model."""
    model_roots: Annotated[list[Path], NoDecode] = []
    """Folders below which models may lie, comma separated; default: `models` below `home`."""
    harness_tasks: Path | None = None
    """A folder of task files of lm-evaluation-harness, which may name Python functions: as trusted as Recoup
    itself. API and workers each need it."""
    api_key: SecretStr | None = None
    """The operator's own key. Without it, and without keys in the ledger, only loopback names are served."""
    aliases: dict[str, Alias] = {}
    """As JSON: `{"gpt-4o-mini": {"student": "…", "teacher": "…", "method": "auto"}}`."""
    secret: SecretStr | None = None
    """Signs cursors; several hosts share it. Default: a file below `home`."""
    requests_per_second: Annotated[float, Field(gt=0)] = 50
    """How often one key may call in the long run."""
    request_burst: Count = 200
    """How often at once."""
    max_live_jobs: Count = 1000
    """Recoveries of one tenant that have not ended."""
    max_deployments: Count = 20
    """Of one tenant, in service at a time."""
    max_serving_requests: Count = 256
    """That one server answers at a time for the gateway of one process; more wait for their turn outside."""
    answer_seconds: Seconds = 300
    """For so long a server may be silent in the middle of an answer."""
    reconcile_seconds: Seconds = 2
    """How often the servers are compared with what is wanted."""
    probe_seconds: Seconds = 60
    """How often what a deployment does on a server is measured again."""
    max_stored_bytes: Count = 100 << 30
    """Data sets of one tenant."""
    queue: Annotated[str, Field(pattern=r"^[a-z0-9.]{1,64}$")] = "gpu.cpu"
    """The class of machine that new jobs ask for."""
    gpus: Annotated[list[Gpu], NoDecode] = []
    """The GPUs of this host that a worker has for itself and trains on together, comma separated; default:
    it sees all, and trains on the first."""
    lease_seconds: Seconds = 30
    """A worker that does not renew its claim for so long has lost it."""
    grace_seconds: Seconds = 25
    """From SIGTERM to SIGKILL, for a runner that is told to stop."""
    stall_seconds: Seconds = 1800
    """A runner that writes nothing into the ledger for so long is stuck, and is killed."""
    sweep_seconds: Seconds = 1
    republish_seconds: Seconds = 60
    """A hint that nobody followed for so long is published again."""
    log_format: Literal["json", "text"] = "text"
    """One line an event; `json` for machines that collect logs."""
    metrics_listen: Annotated[str | None, Field(pattern=r"^[0-9a-z.:\[\]-]*:\d{1,5}$")] = None
    """`address:port` where a worker shows its metrics to Prometheus, without a key; none: nowhere."""
    max_application_failures: Count = 3
    max_infrastructure_losses: Count = 5

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - called by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        files = SecretsSettingsSource(settings_cls, os.environ.get(f"{PREFIX}SECRETS_DIR") or None)
        return init_settings, env_settings, files

    @field_validator("vllm_urls", "rollout_urls", "serve_urls", "model_roots", "gpus", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("harness_tasks")
    @classmethod
    def _absolute_where_given(cls, folder: Path | None) -> Path | None:
        return folder and folder.expanduser().resolve()

    @field_validator("database_url")
    @classmethod
    def _ledger_at_home(cls, url: str | None, info: ValidationInfo) -> str | None:
        return url or f"sqlite:///{info.data['home'] / 'ledger.db'}"

    @field_validator("gpus")
    @classmethod
    def _different(cls, gpus: list[str]) -> list[str]:
        if len(set(gpus)) < len(gpus):
            raise ValueError(f"{', '.join(gpus)} names a GPU twice")
        return gpus

    @field_validator("artifacts_url")
    @classmethod
    def _has_client(cls, url: str | None) -> str | None:
        if url and find_spec("obstore") is None:
            raise ValueError("an S3 store needs the package obstore: pip install 'recoup-server[s3]'")
        return url

    @field_validator("model_roots")
    @classmethod
    def _roots_at_home(cls, roots: list[Path], info: ValidationInfo) -> list[Path]:
        return [root.expanduser().resolve() for root in roots] or [info.data["home"] / "models"]

    @property
    def files_dir(self) -> Path:
        return self.home / "files"

    @property
    def deployments_dir(self) -> Path:
        """What servers load; they see it under this same path."""
        return self.home / "deployments"

    @property
    def jobs_dir(self) -> Path:
        return self.home / "jobs"

    def stage_folder(self, folder: str) -> Path:
        """Where the result of a committed stage lies; the ledger keeps the path below `jobs_dir`."""
        return self.jobs_dir / folder

    def environment(self) -> dict[str, str]:
        """The variables from which a child process reads these same settings, the key included."""
        values = {PREFIX + name.upper(): _as_text(value) for name, value in self}
        return {name: text for name, text in values.items() if text}


def _as_text(value: Any) -> str:
    as_text: dict[type, Callable[[Any], str]] = {
        type(None): lambda _: "",
        dict: lambda aliases: json.dumps({name: dict(alias) for name, alias in aliases.items()}),
        list: lambda parts: ",".join(map(str, parts)),
        SecretStr: SecretStr.get_secret_value,
    }
    return as_text.get(type(value), str)(value)
