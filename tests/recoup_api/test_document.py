"""The OpenAPI document: complete, valid, and compatible with the one that was reviewed."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from recoup_api.document import OPERATIONS

REVIEWED = Path(__file__).parents[2] / "docs" / "openapi.json"
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
    for path, _, operation in operations(document):
        if path.startswith("/v1/"):
            assert {"401", "403", "422", "429", "500"} <= operation["responses"].keys()
            names_a_thing = "{" in path or path.endswith("/completions")
            assert ("404" in operation["responses"]) == names_a_thing


def test_examples_are_valid(document):
    for _, _, operation in operations(document):
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in (body.get("content", {}).get("application/json", {}) for body in bodies):
            if "example" in content:
                schema = {"components": document["components"], **content["schema"]}
                Draft202012Validator(schema).validate(content["example"])


def required(schema):
    return set(schema.get("required", ()))


def breaks(old, new):
    """What a client of the old document would stumble over in the new one."""
    for path, method, operation in operations(old):
        now = new["paths"].get(path, {}).get(method)
        if now is None:
            yield f"{method} {path} is gone"
            continue
        known = {(p["in"], p["name"]) for p in now.get("parameters", ())}
        yield from (
            f"{method} {path} lost {p['name']}"
            for p in operation.get("parameters", ())
            if (p["in"], p["name"]) not in known
        )
        before = {(p["in"], p["name"]) for p in operation.get("parameters", ()) if p.get("required")}
        demanded = {(p["in"], p["name"]) for p in now.get("parameters", ()) if p.get("required")}
        yield from (f"{method} {path} demands {name}" for _, name in demanded - before)
    for name, schema in old["components"]["schemas"].items():
        now = new["components"]["schemas"].get(name, {})
        gone = schema.get("properties", {}).keys() - now.get("properties", {}).keys()
        yield from (f"{name} lost {field}" for field in gone)
        if name.endswith("Input"):
            yield from (f"{name} demands {field}" for field in required(now) - required(schema))


def test_the_reviewed_document_breaks_nothing_that_was_promised(document):
    assert list(breaks(json.loads(REVIEWED.read_text()), document)) == []


def test_a_break_is_seen(document):
    new = json.loads(json.dumps(document))
    del new["paths"]["/healthz"]
    new["components"]["schemas"]["CreateRecoveryInput"]["required"].append("seed")
    del new["components"]["schemas"]["File"]["properties"]["rows"]
    new["paths"]["/v1/fine_tuning/jobs"]["get"]["parameters"] = []
    assert sorted(breaks(document, new)) == [
        "CreateRecoveryInput demands seed",
        "File lost rows",
        "get /healthz is gone",
        "get /v1/fine_tuning/jobs lost after",
        "get /v1/fine_tuning/jobs lost limit",
    ]
