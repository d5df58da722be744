from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from recoup_jobs.settings import Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"RECOUP_{name.upper()}", raising=False)


def test_a_child_process_reads_the_same_settings(tmp_path, monkeypatch):
    settings = Settings(
        home=tmp_path,
        broker_url="redis://broker/0",
        vllm_urls=["http://a", "http://b"],
        model_roots=[tmp_path / "m", tmp_path / "n"],
        api_key=SecretStr("secret"),
        lease_seconds=3,
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_everything_lies_below_home_unless_told_otherwise(tmp_path):
    settings = Settings(home=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/ledger.db"
    assert settings.model_roots == [tmp_path / "models"]


def test_a_folder_of_harness_tasks_is_the_same_wherever_a_process_runs(monkeypatch):
    monkeypatch.setenv("RECOUP_HARNESS_TASKS", "tasks")
    assert Settings().harness_tasks == Path.cwd() / "tasks"


def test_lists_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("RECOUP_MODEL_ROOTS", "/a, /b,")
    assert Settings().model_roots == [Path("/a"), Path("/b")]


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("RECOUP_API_KEY", "")
    assert Settings().api_key is None


def test_a_lease_of_no_time_is_refused():
    with pytest.raises(ValidationError, match="lease_seconds"):
        Settings(lease_seconds=0)


def test_secrets_are_not_shown():
    shown = repr(Settings(api_key=SecretStr("hunter2"), database_url="postgresql://me:hunter2@host/db"))
    assert "hunter2" not in shown
