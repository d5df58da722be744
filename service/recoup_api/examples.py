"""Examples of the OpenAPI document, made of the models themselves so that they cannot be wrong."""

from typing import Any

from recoup.schemas import (
    Artifact,
    Capabilities,
    CreateDiagnosis,
    CreateRecovery,
    DeletedFile,
    Deployment,
    Diagnosis,
    Event,
    File,
    Launch,
    Lineage,
    ModelRef,
    Problem,
    Recovery,
    ReplicaStanding,
)
from recoup.schemas.webhook import Webhook
from recoup_jobs.openai_jobs import as_checkpoint, as_job, as_job_event

RECOVERY_ID, FILE_ID = "rec_5f0c9a1e7d3b4c2a8e6f1d09", "file-0123456789abcdef01234567"
OTHER_ID, DIAGNOSIS_ID = "rec_a81d7c3f0e9b4d5c6f2a1b08", "dia_9e1b4f7a2c6d8e0b3a5f7c19"
OTHER_DIAGNOSIS_ID = "dia_0c3e5a7b9d1f2e4c6a8b0d31"
AT = 1764000000.0

REQUEST = {
    "student": {"source": "my-pruned-model"},
    "teacher": {"source": "its-original"},
    "prompts": {"file": FILE_ID},
    "metadata": {"ticket": "42"},
}

DRY_RUN = {
    "object": "recovery.dry_run",
    "plan": [
        {
            "name": "method",
            "value": "off_policy",
            "why": "the teacher's distribution on its own answers recovered most at equal cost",
        },
        {"name": "mode", "value": "full", "why": "what a pruned student must learn anew needs all weights"},
    ],
    "findings": [
        {
            "pointer": "/keep/file",
            "code": "file_not_found",
            "message": "there is no file of this id; upload one with POST /v1/files",
        }
    ],
    "warnings": [
        {
            "pointer": "/output/kind",
            "code": "base_not_servable",
            "message": "vLLM loads no weights packed by bitsandbytes; use output.kind merged",
        }
    ],
    "estimate": {
        "tokens": 412_000,
        "memory_bytes": 3_400_000_000,
        "disk_bytes": 900_000_000,
        "seconds": 1260.0,
        "calibrated_on": 12,
    },
}

CHANGE = {"priority": 50, "metadata": {"ticket": "43"}}

DIAGNOSIS_REQUEST = {"student": {"source": "my-pruned-model"}, "teacher": {"source": "its-original"}}

JOB_REQUEST = {
    "model": "my-model",
    "training_file": FILE_ID,
    "method": {"type": "supervised"},
    "suffix": "tone",
}

WEBHOOK_REQUEST = {"url": "https://hooks.example.com/recoup", "events": ["recovery.succeeded"]}

DEPLOYMENT_REQUEST = {"recovery": RECOVERY_ID, "name": "support"}

CHAT_REQUEST = {
    "model": "support",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 40,
    "temperature": 0,
}

COMPLETION_REQUEST = {"model": "support", "prompt": "The capital of France is", "max_tokens": 8}

PROBLEM = Problem(
    type="urn:recoup:problem:invalid_value",
    title="Unprocessable Entity",
    status=422,
    detail="/seed: Input should be a valid integer",
    code="invalid_value",
    request_id="req_2791ae51ecf1235c3b9c8bea",
    errors=[],
).model_dump()

_recovery = Recovery(
    id=RECOVERY_ID,
    object="recovery",
    state="queued",
    stage=None,
    outcome=None,
    error=None,
    progress=None,
    request=CreateRecovery(
        student=ModelRef(source="my-pruned-model"), teacher=ModelRef(source="its-original")
    ),
    pausing=False,
    retry_of=None,
    epoch=0,
    failures=0,
    losses=0,
    version=1,
    created_at=AT,
    started_at=None,
    finished_at=None,
).model_dump(mode="json")
_event = Event(
    object="recovery.event", seq=1, epoch=0, type="state", data={"state": "queued", "from": None}, at=AT
).model_dump()
_file = File(
    id=FILE_ID,
    object="file",
    bytes=4096,
    created_at=int(AT),
    filename="general.jsonl",
    purpose="fine-tune",
    status="processed",
    rows=64,
    sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
).model_dump()
_job = as_job(Recovery.model_validate(_recovery), {}, "default")
_job_event = as_job_event(Event.model_validate(_event))
_checkpoint = as_checkpoint(
    RECOVERY_ID,
    Event.model_validate(_event | {"seq": 9, "type": "metric", "data": {"step": 40, "kl": 0.021}}),
)
_webhook = Webhook(
    id="wh_0123456789abcdef01234567",
    object="webhook",
    url="https://hooks.example.com/recoup",
    events=["recovery.succeeded"],
    created_at=AT,
    disabled_at=None,
).model_dump()
_deployment = Deployment(
    id="dep_0123456789abcdef01234567",
    object="deployment",
    name="support",
    kind="adapter",
    state="live",
    reason=None,
    lineage=Lineage(
        recovery=RECOVERY_ID, student="my-pruned-model", teacher="its-original", outcome="recovered"
    ),
    replicas=[ReplicaStanding(replica=0, state="ready", reason=None, checked_at=AT + 20)],
    launch=Launch(
        arguments=["my-pruned-model", "--enable-lora", "--max-lora-rank", "16"],
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
    ),
    version=3,
    created_at=AT,
    live_at=AT + 20,
    ended_at=None,
).model_dump(mode="json")
_model = {
    "id": "support",
    "object": "model",
    "created": int(AT),
    "owned_by": "recoup",
    "deployment": _deployment["id"],
    "lineage": _deployment["lineage"],
}
_choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
_completion = {
    "id": "chatcmpl-1",
    "created": int(AT),
    "model": "support",
    "usage": {"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17},
}
_artifact = Artifact(object="artifact", path="report.json", size=2048, sha256=_file["sha256"]).model_dump()


def _page(item: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [item], "has_more": False, "next_cursor": None}


_SHARED = (Diagnosis.model_fields.keys() & _recovery.keys()) - {"id", "object", "request"}
_diagnosis = Diagnosis(
    id=DIAGNOSIS_ID,
    object="diagnosis",
    request=CreateDiagnosis.model_validate(DIAGNOSIS_REQUEST),
    report=None,
    **{name: _recovery[name] for name in _SHARED},
).model_dump(mode="json")

EXAMPLES: dict[str, Any] = {
    "createRecovery": _recovery,
    "listRecoveries": _page(_recovery),
    "getRecovery": _recovery,
    "cancelRecovery": _recovery | {"state": "cancelled", "finished_at": AT + 60, "version": 2},
    "changeRecovery": _recovery | {"version": 2},
    "pauseRecovery": _recovery | {"state": "paused", "version": 2},
    "resumeRecovery": _recovery | {"version": 3},
    "retryRecovery": _recovery | {"id": OTHER_ID, "retry_of": RECOVERY_ID},
    "listRecoveryEvents": _page(_event),
    "createDiagnosis": _diagnosis,
    "listDiagnoses": _page(_diagnosis),
    "getDiagnosis": _diagnosis,
    "changeDiagnosis": _diagnosis | {"version": 2},
    "cancelDiagnosis": _diagnosis | {"state": "cancelled", "finished_at": AT + 60, "version": 2},
    "pauseDiagnosis": _diagnosis | {"state": "paused", "version": 2},
    "resumeDiagnosis": _diagnosis | {"version": 3},
    "retryDiagnosis": _diagnosis | {"id": OTHER_DIAGNOSIS_ID, "retry_of": DIAGNOSIS_ID},
    "listDiagnosisEvents": _page(_event),
    "listArtifacts": _page(_artifact),
    "createFile": _file,
    "listFiles": _page(_file),
    "getFile": _file,
    "deleteFile": DeletedFile(id=FILE_ID, object="file", deleted=True).model_dump(),
    "createFineTuningJob": _job,
    "listFineTuningJobs": _page(_job),
    "getFineTuningJob": _job,
    "cancelFineTuningJob": _job | {"status": "cancelled", "finished_at": int(AT) + 60},
    "pauseFineTuningJob": _job,
    "resumeFineTuningJob": _job,
    "listFineTuningEvents": _page(_job_event),
    "listFineTuningCheckpoints": _page(_checkpoint),
    "createWebhook": _webhook | {"secret": "whsec_c2hvd24gb25jZQ=="},
    "listWebhooks": _page(_webhook),
    "getWebhook": _webhook,
    "createDeployment": _deployment | {"state": "pending", "replicas": [], "live_at": None},
    "listDeployments": _page(_deployment),
    "getDeployment": _deployment,
    "withdrawDeployment": _deployment | {"state": "withdrawn", "ended_at": AT + 60},
    "rollBackDeployment": _deployment | {"state": "pending", "version": 5},
    "listModels": _page(_model),
    "getModel": _model,
    "createChatCompletion": _completion
    | {
        "object": "chat.completion",
        "choices": [_choice | {"message": {"role": "assistant", "content": "Paris."}}],
    },
    "createCompletion": _completion
    | {"object": "text_completion", "choices": [_choice | {"text": " Paris."}]},
    "getCapabilities": Capabilities(
        version="0.1.0",
        damages=["finetuning", "quantization", "pruning"],
        methods=["auto", "off_policy"],
        training_modes=["auto", "lora"],
        models=["my-pruned-model", "its-original"],
    ).model_dump(),
    "getHealth": {"status": "ok"},
    "getReadiness": {"status": "ready"},
}
"""By operation."""
