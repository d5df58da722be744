"""From what a recovery published to what servers load: checked when asked for, copied when placed.

A deployment has a folder of its own, below one that all servers see: it holds the weights under the
name by which a server of its base knows that base, so that vLLM's filesystem resolver finds it too.
"""

import hashlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from recoup.schemas import CreateDeployment, Deployment, EffectProbe, Lineage, ProblemItem, Recovery
from recoup_jobs import durable
from recoup_jobs.artifacts import Published, open_artifact, open_published, save
from recoup_jobs.deployments import NewDeployment, new_id
from recoup_jobs.errors import NotFound, RecoupError, Unprocessable
from recoup_jobs.ledger import Ledger
from recoup_jobs.servability import ADAPTER_CONFIG, launch_adapter, launch_model, require_servable
from recoup_jobs.settings import Settings
from recoup_jobs.sources import locate
from recoup_jobs.stores import open_store

PROBE = "probe.json"


def prepared(asked: CreateDeployment, ledger: Ledger, settings: Settings, tenant: str) -> NewDeployment:
    """The deployment that is asked for; raises `Unprocessable` for what cannot be served."""
    try:
        return _prepared(asked, ledger, settings, tenant)
    except RecoupError as error:
        item = ProblemItem(pointer="/recovery", code=error.code, message=error.message)
        raise Unprocessable(error.code, f"/recovery: {error.message}", [item]) from None


def read_probe(ledger: Ledger, settings: Settings, recovery: str) -> EffectProbe:
    """What the trainer measured; raises `NotFound` where a recovery is older than probes are."""
    try:
        opened = open_artifact(_published(ledger, settings, recovery), PROBE)
        return EffectProbe.model_validate_json(opened.read_bytes())
    except (NotFound, ValidationError):
        raise NotFound("no_probe", "the recovery has no probe.json to prove it by; repeat it") from None


def place(deployment: Deployment, base: str, ledger: Ledger, settings: Settings) -> Path:
    """The deployment's folder, made where it is not there; `base` is the student's name on the servers."""
    folder = settings.deployments_dir / deployment.id
    if folder.exists():
        return folder
    settings.deployments_dir.mkdir(parents=True, exist_ok=True)
    aside = settings.deployments_dir / f".{deployment.id}"
    shutil.rmtree(aside, ignore_errors=True)
    save(_published(ledger, settings, deployment.lineage.recovery), deployment.kind, aside)
    if deployment.kind == "adapter":
        config = json.loads((aside / ADAPTER_CONFIG).read_bytes()) | {"base_model_name_or_path": base}
        (aside / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1))
    durable.sync_folder(aside)
    aside.rename(folder)
    return folder


def placed(settings: Settings) -> set[str]:
    """The deployments that have a folder."""
    return {folder.name for folder in settings.deployments_dir.glob("dep_*")}


def clear(id: str, settings: Settings) -> None:
    """Removes a deployment's folder."""
    shutil.rmtree(settings.deployments_dir / id, ignore_errors=True)


def base_changed(deployment: Deployment, probe: EffectProbe, settings: Settings) -> bool:
    """Whether the student that lies here is no longer the one that the adapter was trained on.

    A student that lies elsewhere is not looked at: the probe will tell.
    """
    try:
        folder = locate(deployment.lineage.student, settings.model_roots).path
    except Unprocessable:
        return False
    return weights_sha256(folder) != probe.base_sha256


def weights_sha256(folder: Path) -> str:
    """One hash over all weight files of a folder in the order of their names, as in a report's provenance."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _prepared(asked: CreateDeployment, ledger: Ledger, settings: Settings, tenant: str) -> NewDeployment:
    recovery = ledger.get(asked.recovery, tenant)
    published = _published(ledger, settings, recovery.id)
    read_probe(ledger, settings, recovery.id)
    student, id = recovery.request.student.source, new_id()
    lineage = _lineage(recovery)
    name = asked.name or recovery.request.output.name or recovery.id
    if "adapter" in _folders(published):
        with TemporaryDirectory(prefix="recoup-adapter-") as place:
            save(published, "adapter", Path(place) / "adapter")
            rank = require_servable(Path(place) / "adapter")
        return NewDeployment(id, tenant, name, "adapter", lineage, launch_adapter(student, rank))
    return NewDeployment(id, tenant, name, "model", lineage, launch_model(f"deployments/{id}", id))


def _lineage(recovery: Recovery) -> Lineage:
    return Lineage(
        recovery=recovery.id,
        student=recovery.request.student.source,
        teacher=recovery.request.teacher.source,
        outcome=recovery.outcome or "no_gain",
    )


def _folders(published: Published) -> set[str]:
    return {artifact.path.partition("/")[0] for artifact in published.artifacts}


def _published(ledger: Ledger, settings: Settings, id: str) -> Published:
    """A recovery's artifacts; raises `NotFound` unless it handed weights over."""
    recovery = ledger.get(id)
    if recovery.state != "succeeded":
        raise NotFound("not_finished", f"the recovery is {recovery.state}; deploy one that succeeded")
    published = open_published(open_store(settings), ledger.committed(id)["package"])
    if _folders(published).isdisjoint({"adapter", "model"}):
        message = f"the recovery's outcome is {recovery.outcome}: it handed no weights over"
        raise NotFound("nothing_to_deploy", message)
    return published
