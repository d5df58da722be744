import pytest
from typer.testing import CliRunner

from recoup_jobs.keys import Keyring
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings
from recoup_server.cli import app


@pytest.fixture
def keys(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["keys", *arguments, "--home", str(tmp_path)])

    return run


def test_a_key_that_is_made_is_listed_without_its_secret_and_can_be_revoked(keys, tmp_path):
    key = keys("create", "laptop", "--tenant", "team", "--scope", "jobs:read").stdout.strip()
    prefix, secret = key.split("_", 2)[1:]
    ledger = open_ledger(Settings(home=tmp_path))
    assert Keyring(ledger, None).admit(key).scopes == {"jobs:read"}
    ledger.close()
    listed = keys("list").stdout
    assert listed.split() == [prefix, "live", "team", "laptop", "jobs:read"]
    assert secret not in listed
    assert keys("revoke", prefix).exit_code == 0
    assert "revoked" in keys("list").stdout
    assert keys("revoke", prefix).exit_code == 1


def test_a_scope_that_there_is_not_is_refused(keys):
    refused = keys("create", "laptop", "--scope", "everything")
    assert refused.exit_code == 2
    assert "jobs:write" in refused.stderr


def test_nothing_but_loopback_is_listened_on_without_a_key(tmp_path):
    refused = CliRunner().invoke(app, ["api", "--host", "0.0.0.0", "--home", str(tmp_path)])
    assert refused.exit_code == 2
    assert "keys create" in refused.stderr
