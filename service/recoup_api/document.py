"""The OpenAPI document: what FastAPI knows of the routes, and here what it cannot know.

`OPERATIONS` names every operation by hand (generated clients call it so), with the errors it may answer and
an example of its success. A route that is missing here fails the tests, and `docs/openapi.json` is the
document as it was reviewed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from recoup_api.examples import DRY_RUN, EXAMPLES, PROBLEM

JSON, PROBLEM_JSON = "application/json", "application/problem+json"
ALWAYS = frozenset({400, 401, 403, 422, 429, 431, 500, 503})
"""What any route behind the door may answer."""
OPEN = frozenset({400, 422, 431, 500})
"""What any route at all may answer."""
CREATES = frozenset({408, 409, 413, 415, 507})
CHANGES = frozenset({404, 409, 412})
ANSWERS = frozenset({404, 408, 413, 415})
KEY = "Not asked for before the first key is made."
DESCRIPTION = (
    "Restores language models that lost ability, and proves it. Errors are RFC 9457 problems: compare "
    "`code`. Lists are paged by `after` and `next_cursor`."
)


@dataclass(frozen=True)
class Operation:
    id: str
    summary: str
    errors: frozenset[int] = frozenset()
    """Beside those that any route may answer."""
    kinds: tuple[str, ...] = ()
    """Content types of success beside JSON, or instead of it where there is no example."""
    extra: dict[int, str] = field(default_factory=dict)
    """Other answers without a body: 304."""


def _o(id: str, summary: str, errors: Iterable[int] = (), *kinds: str, **extra: Any) -> Operation:
    return Operation(id, summary, frozenset(errors), kinds, **extra)


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/recoveries"): _o("createRecovery", "Queue a recovery", CREATES),
    ("get", "/v1/recoveries"): _o("listRecoveries", "List recoveries, newest first"),
    ("get", "/v1/recoveries/{id}"): _o(
        "getRecovery", "Read a recovery, or wait for its next change", {404}, extra={304: "Not changed."}
    ),
    ("post", "/v1/recoveries/{id}/cancel"): _o("cancelRecovery", "Stop a recovery", CHANGES),
    ("patch", "/v1/recoveries/{id}"): _o(
        "changeRecovery", "Change priority or metadata of a recovery", CHANGES | {408, 413, 415}
    ),
    ("post", "/v1/recoveries/{id}/pause"): _o("pauseRecovery", "Give a recovery's device back", CHANGES),
    ("post", "/v1/recoveries/{id}/resume"): _o("resumeRecovery", "Go on with a recovery", CHANGES),
    ("post", "/v1/recoveries/{id}/retry"): _o(
        "retryRecovery", "Repeat a recovery that failed or was cancelled", {400, 404, 409, 422}
    ),
    ("get", "/v1/recoveries/{id}/events"): _o(
        "listRecoveryEvents", "Read or stream the history of a recovery", {404}, "text/event-stream"
    ),
    ("get", "/v1/recoveries/{id}/report"): _o(
        "getReport", "Read the report of a recovery", {404, 409}, "text/html"
    ),
    ("get", "/v1/recoveries/{id}/alignment"): _o(
        "getAlignment",
        "Read the alignment of a recovery, layer by layer",
        {404, 409},
        "text/csv",
        "image/svg+xml",
        "image/png",
    ),
    ("get", "/v1/recoveries/{id}/recipe"): _o(
        "getRecipe", "Fetch a script that repeats a recovery", {404, 409}, "text/x-python"
    ),
    ("get", "/v1/recoveries/{id}/artifacts"): _o("listArtifacts", "List the files of a recovery", {404, 409}),
    ("get", "/v1/recoveries/{id}/artifacts/{path}"): _o(
        "getArtifact",
        "Fetch a file of a recovery",
        {404, 409, 416},
        "*/*",
        extra={206: "The range that was asked for."},
    ),
    ("post", "/v1/diagnoses"): _o("createDiagnosis", "Queue a diagnosis", CREATES),
    ("get", "/v1/diagnoses"): _o("listDiagnoses", "List diagnoses, newest first, without their reports"),
    ("get", "/v1/diagnoses/{id}"): _o(
        "getDiagnosis", "Read a diagnosis, or wait for its next change", {404}, extra={304: "Not changed."}
    ),
    ("patch", "/v1/diagnoses/{id}"): _o(
        "changeDiagnosis", "Change priority or metadata of a diagnosis", CHANGES | {408, 413, 415}
    ),
    ("post", "/v1/diagnoses/{id}/cancel"): _o("cancelDiagnosis", "Stop a diagnosis", CHANGES),
    ("post", "/v1/diagnoses/{id}/pause"): _o("pauseDiagnosis", "Give a diagnosis's device back", CHANGES),
    ("post", "/v1/diagnoses/{id}/resume"): _o("resumeDiagnosis", "Go on with a diagnosis", CHANGES),
    ("post", "/v1/diagnoses/{id}/retry"): _o(
        "retryDiagnosis", "Repeat a diagnosis that failed or was cancelled", {404, 409}
    ),
    ("get", "/v1/diagnoses/{id}/events"): _o(
        "listDiagnosisEvents", "Read or stream the history of a diagnosis", {404}, "text/event-stream"
    ),
    ("get", "/v1/diagnoses/{id}/alignment"): _o(
        "getDiagnosisAlignment",
        "Read the alignment before, ceiling and floor",
        {404, 409},
        "text/csv",
        "image/svg+xml",
        "image/png",
    ),
    ("post", "/v1/files"): _o("createFile", "Upload a data set", CREATES),
    ("get", "/v1/files"): _o("listFiles", "List data sets, newest first"),
    ("get", "/v1/files/{id}"): _o("getFile", "Describe a data set", {404}),
    ("delete", "/v1/files/{id}"): _o("deleteFile", "Remove a data set", {404, 409}),
    ("get", "/v1/files/{id}/content"): _o(
        "getFileContent", "Fetch a data set", {404}, "application/jsonl", extra={206: "The range asked for."}
    ),
    ("post", "/v1/fine_tuning/jobs"): _o("createFineTuningJob", "Fine-tune, as OpenAI's API does", CREATES),
    ("get", "/v1/fine_tuning/jobs"): _o("listFineTuningJobs", "List jobs, newest first"),
    ("get", "/v1/fine_tuning/jobs/{id}"): _o("getFineTuningJob", "Read a job", {404}),
    ("post", "/v1/fine_tuning/jobs/{id}/cancel"): _o("cancelFineTuningJob", "Stop a job", {404, 409}),
    ("post", "/v1/fine_tuning/jobs/{id}/pause"): _o("pauseFineTuningJob", "Hold a job", {404, 409}),
    ("post", "/v1/fine_tuning/jobs/{id}/resume"): _o("resumeFineTuningJob", "Go on with a job", {404, 409}),
    ("get", "/v1/fine_tuning/jobs/{id}/events"): _o(
        "listFineTuningEvents", "What happened, newest first", {404}
    ),
    ("get", "/v1/fine_tuning/jobs/{id}/checkpoints"): _o(
        "listFineTuningCheckpoints", "Validated steps, newest first", {404}
    ),
    ("post", "/v1/webhooks"): _o("createWebhook", "Be told when recoveries end", CREATES - {409}),
    ("get", "/v1/webhooks"): _o("listWebhooks", "List webhooks, oldest first"),
    ("get", "/v1/webhooks/{id}"): _o("getWebhook", "Read a webhook", {404}),
    ("delete", "/v1/webhooks/{id}"): _o("deleteWebhook", "Be told no more", {404}),
    ("post", "/v1/deployments"): _o("createDeployment", "Serve what a recovery handed over", CREATES),
    ("get", "/v1/deployments"): _o("listDeployments", "List deployments, newest first"),
    ("get", "/v1/deployments/{id}"): _o("getDeployment", "Read a deployment", {404}),
    ("delete", "/v1/deployments/{id}"): _o("withdrawDeployment", "Take a deployment out of service", {404}),
    ("post", "/v1/deployments/{id}/rollback"): _o(
        "rollBackDeployment", "Serve what had the name before", {404, 409}
    ),
    ("get", "/v1/models"): _o("listModels", "List what is served, with where it comes from"),
    ("get", "/v1/models/{id}"): _o("getModel", "Read what is served under a name", {404}),
    ("post", "/v1/chat/completions"): _o(
        "createChatCompletion", "Answer a conversation", ANSWERS, "text/event-stream"
    ),
    ("post", "/v1/completions"): _o("createCompletion", "Go on with a text", ANSWERS, "text/event-stream"),
    ("get", "/v1/capabilities"): _o("getCapabilities", "What this installation can do"),
    ("get", "/healthz"): _o("getHealth", "Whether the process is alive"),
    ("get", "/metrics"): _o("getMetrics", "What Prometheus reads", (), "text/plain"),
    ("get", "/readyz"): _o("getReadiness", "Whether the service can work", {503}),
}


def install(app: FastAPI, inputs: Iterable[type[BaseModel]]) -> None:
    """Makes the application serve the whole document; `inputs` are the models of JSON bodies."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = document(app, inputs)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def document(app: FastAPI, inputs: Iterable[type[BaseModel]]) -> dict[str, Any]:
    doc = get_openapi(
        title=app.title,
        version=app.version,
        routes=app.routes,
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/", "description": "This server."}],
    )
    components = doc["components"]
    for model in inputs:
        components["schemas"] |= _input_schemas(model)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": KEY}}
    components["responses"] = {f"Problem{status}": _problem(status) for status in sorted(_statuses())}
    for path, operations in doc["paths"].items():
        for method, operation in operations.items():
            _complete(operation, path, OPERATIONS[method, path])
    return doc


def _complete(operation: dict[str, Any], path: str, known: Operation) -> None:
    is_open = not path.startswith("/v1/")
    operation |= {"operationId": known.id, "summary": known.summary}
    operation["security"] = [] if is_open else [{"key": []}]
    responses = operation["responses"]
    del responses["default"]
    success = next(status for status in responses if status.startswith("2"))
    content = responses[success].get("content", {})
    if known.id in EXAMPLES and JSON in content:
        content[JSON]["example"] = EXAMPLES[known.id]
    elif not content.get(JSON, {}).get("schema"):
        content.pop(JSON, None)
    # a file of any kind is bytes, of which a schema says nothing, and not a string in JSON
    content |= {kind: {} if kind == "*/*" else {"schema": {"type": "string"}} for kind in known.kinds}
    responses[success] = {"description": known.summary + "."} | ({"content": content} if content else {})
    responses |= {str(status): {"description": text} for status, text in known.extra.items()}
    if known.id == "createRecovery":
        responses["200"]["content"][JSON]["example"] = DRY_RUN
    errors = known.errors | (OPEN if is_open else ALWAYS)
    responses |= {str(s): {"$ref": f"#/components/responses/Problem{s}"} for s in sorted(errors)}


def _statuses() -> frozenset[int]:
    return ALWAYS.union(*(operation.errors for operation in OPERATIONS.values()))


def _problem(status: int) -> dict[str, Any]:
    example = PROBLEM | {"status": status, "title": HTTPStatus(status).phrase}
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_JSON: {"schema": schema, "example": example}},
    }


def _input_schemas(model: type[BaseModel]) -> dict[str, Any]:
    """Under names of their own: an answer that repeats a request shows every default."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}Input")
    inner = schema.pop("$defs", {})
    return {f"{name}Input": definition for name, definition in {**inner, model.__name__: schema}.items()}
