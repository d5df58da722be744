"""The OpenAPI document: complete, valid, and compatible with the one that was reviewed."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from recoup_api.compatibility import breaks
from recoup_api.document import OPERATIONS

REVIEWED = Path(__file__).parents[2] / "docs" / "openapi.json"
LINTER = "@redocly/cli@2"
UPDATE = "python -m recoup_api > docs/openapi.json"


@pytest.fixture
def document(client):
    return client.get("/openapi.json").json()


def operations(document):
    paths = document["paths"].items()
    return [(path, method, operation) for path, it in paths for method, operation in it.items()]


def test_the_document_is_openapi(document):
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_the_document_is_the_one_that_was_reviewed(document):
    assert document == json.loads(REVIEWED.read_text()), f"review the difference, then: {UPDATE}"


def test_every_operation_is_named_by_hand_and_there(document):
    named = {(method, path): operation["operationId"] for path, method, operation in operations(document)}
    assert named == {place: operation.id for place, operation in OPERATIONS.items()}
    assert len(set(named.values())) == len(named)


def test_every_operation_behind_the_door_declares_its_errors(document):
    behind = [(path, operation) for path, _, operation in operations(document) if path.startswith("/v1/")]
    assert behind
    for path, operation in behind:
        assert {"401", "403", "422", "429", "500"} <= operation["responses"].keys()
        names_a_thing = "{" in path or path.endswith("/completions")
        assert ("404" in operation["responses"]) == names_a_thing


def test_examples_are_valid(document):
    seen = 0
    for _, _, operation in operations(document):
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in (body.get("content", {}).get("application/json", {}) for body in bodies):
            if "example" in content:
                schema = {"components": document["components"], **content["schema"]}
                Draft202012Validator(schema).validate(content["example"])
                seen += 1
    assert seen > len(OPERATIONS) / 2


def changed(document, change):
    """What breaks once `change` was made to a copy of the document."""
    new = copy.deepcopy(document)
    change(new["paths"], new["components"]["schemas"])
    return sorted(breaks(document, new))


def test_the_same_document_breaks_nothing(document):
    assert list(breaks(document, document)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda paths, _: paths.pop("/healthz"), ["get /healthz is gone"]),
        (lambda _, schemas: schemas["File"]["properties"].pop("rows"), ["File lost rows"]),
        (lambda _, schemas: schemas["File"]["required"].remove("rows"), ["File may lack rows"]),
        (
            lambda _, schemas: schemas["File"]["properties"]["rows"].update(type="string"),
            ["File.rows may be string"],
        ),
        (
            lambda _, schemas: schemas["CreateRecoveryInput"]["required"].append("seed"),
            ["CreateRecoveryInput demands seed"],
        ),
        (
            lambda _, schemas: schemas["CreateRecoveryInput"]["properties"]["seed"].update(maximum=7),
            ["CreateRecoveryInput.seed has a lower maximum"],
        ),
        (
            lambda _, schemas: schemas["CreateRecoveryInput"]["properties"]["seed"].update(type="string"),
            ["CreateRecoveryInput.seed refuses integer"],
        ),
        (
            lambda paths, _: paths["/v1/files"]["get"].update(parameters=[]),
            [f"get /v1/files lost {name}" for name in ("after", "limit", "order", "purpose")],
        ),
        (
            lambda paths, _: paths["/v1/files"]["get"]["parameters"][1].update(required=True),
            ["get /v1/files demands limit"],
        ),
        (
            lambda paths, _: paths["/v1/files"]["get"]["parameters"][3]["schema"].update(enum=["asc"]),
            ["get /v1/files order refuses desc"],
        ),
        (
            lambda paths, _: paths["/v1/recoveries"]["post"]["responses"].pop("202"),
            ["post /v1/recoveries answers 202 no more"],
        ),
    ],
)
def test_a_break_is_told_with_its_place(document, change, found):
    assert changed(document, change) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda paths, _: paths.update({"/v1/new": {"get": {"responses": {}}}}),
        lambda _, schemas: schemas["File"]["properties"].update(more={"type": "string"}),
        lambda _, schemas: schemas["CreateRecoveryInput"]["properties"].update(more={"type": "string"}),
        lambda _, schemas: schemas["CreateRecoveryInput"]["properties"]["seed"].pop("maximum"),
        lambda paths, _: paths["/v1/files"]["get"]["responses"].update({"410": {}}),
    ],
)
def test_what_is_added_breaks_nobody(document, change):
    assert changed(document, change) == []


@pytest.mark.skipif(shutil.which("npx") is None, reason="npm is not installed")
def test_a_public_linter_has_nothing_to_say():
    command = ["npx", "--yes", LINTER, "lint", "--format=summary", str(REVIEWED)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REVIEWED.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"[0-9]+ warning", done.stdout + done.stderr)
