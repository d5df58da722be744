"""Schemathesis against the running service: every check, negative data, and calls that follow each other."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recoup_api.app import create_app

EXAMPLES = os.environ.get("RECOUP_FUZZ_EXAMPLES", "20")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("schemathesis"), reason="needs the extra `fuzz`"),
]


def test_the_service_does_what_its_document_says(serve, settings, ledger, body, tmp_path):
    much = {"api_key": "fuzz", "requests_per_second": 1e6, "request_burst": 10**6, "max_live_jobs": 10**6}
    url = serve(create_app(type(settings)(**dict(settings) | much), ledger))
    command = [sys.executable, "-m", "schemathesis.cli"]
    command += ["--config-file", str(Path(__file__).with_name("schemathesis.toml"))]
    command += ["run", f"{url}/openapi.json", "--header", "Authorization: Bearer fuzz"]
    command += ["--checks", "all", "--mode", "all", "--max-examples", EXAMPLES, "--continue-on-failure"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
