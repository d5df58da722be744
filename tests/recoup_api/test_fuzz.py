"""Schemathesis against the running service: every check, negative data, and calls that follow each other.

Ids that are made up lead nowhere, so every second one is of something that is there, and every second text
may be the name of a model: that is how calls get behind the first look.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recoup_api.app import create_app

EXAMPLES = os.environ.get("RECOUP_FUZZ_EXAMPLES", "20")
SAMPLE = Path(__file__).parents[1] / "recoup" / "report.json"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not importlib.util.find_spec("schemathesis"), reason="needs the extra `fuzz`"),
]


@pytest.fixture
def there(client, body, finish):
    """Ids of what is there, by the path below which it is read."""
    report = json.loads(SAMPLE.read_text())
    ended = finish({"report.json": json.dumps(report), "alignment.json": json.dumps(report["alignment"])})
    made = {
        "recoveries": [client.post("/v1/recoveries", json=body) for _ in range(3)],
        "diagnoses": [client.post("/v1/diagnoses", json=body)],
        "webhooks": [client.post("/v1/webhooks", json={"url": "https://93.184.216.34/hook"})],
        "files": [
            client.post(
                "/v1/files",
                files={"file": ("a.jsonl", b'{"prompt": "Who?"}\n')},
                data={"purpose": "fine-tune"},
            )
        ],
    }
    ids = {path: [answer.json()["id"] for answer in answers] for path, answers in made.items()}
    ids["recoveries"].append(ended)
    return ids | {"fine_tuning/jobs": ids["recoveries"]}


@pytest.fixture
def config(there, tmp_path):
    """What a schema cannot say, for Schemathesis."""
    text = Path(__file__).with_name("schemathesis.toml").read_text()
    text += '\n[dictionaries]\nmodels = { values = ["student", "teacher"] }\n'
    text += "".join(f'"{path}" = {{ values = {json.dumps(ids)} }}\n' for path, ids in there.items())
    text += '\n[generation.dictionaries]\nstring = { dictionary = "models", probability = 0.5 }\n'
    for path in there:
        text += f'\n[[operations]]\ninclude-path-regex = "^/v1/{path}/\\\\{{id"\n'
        text += f'parameters = {{ "path.id" = {{ dictionary = "{path}", probability = 0.5 }} }}\n'
    (tmp_path / "schemathesis.toml").write_text(text)
    return tmp_path / "schemathesis.toml"


def test_the_service_does_what_its_document_says(serve, settings, ledger, config, tmp_path):
    much = {"api_key": "fuzz", "requests_per_second": 1e6, "request_burst": 10**6, "max_live_jobs": 10**6}
    app = create_app(type(settings)(**dict(settings) | much), ledger)
    app.openapi()  # is made once, and a busy machine takes longer over it than Schemathesis waits
    url = serve(app)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)]
    command += ["run", f"{url}/openapi.json", "--header", "Authorization: Bearer fuzz"]
    command += ["--checks", "all", "--mode", "all", "--max-examples", EXAMPLES, "--continue-on-failure"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
