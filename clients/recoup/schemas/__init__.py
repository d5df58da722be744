"""The contract: every value that goes over the wire, and nothing else.

Requests forbid unknown fields, are strict about types and show every default.
Answers have no defaults, are frozen, and keep fields that a newer server adds.

A module of these is loaded when one of its names is first asked for: the classes of all of them cost as
much as a sixth of pydantic and the HTTP library together, and a client needs few.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recoup.schemas.dataset import ChatRow, Message, Prompt, PromptRow, TextRow
    from recoup.schemas.deployment import (
        CreateDeployment,
        Deployment,
        DeploymentState,
        EffectProbe,
        Launch,
        Lineage,
        ProbeRow,
        ReplicaStanding,
    )
    from recoup.schemas.diagnosis import CreateDiagnosis, Diagnosis, DiagnosisReport, ExamSpec, PositionsSpec
    from recoup.schemas.plan import DryRun
    from recoup.schemas.recovery import (
        HANDED_OVER,
        TERMINAL_STATES,
        Artifact,
        Capabilities,
        DeletedFile,
        Event,
        File,
        JobError,
        Outcome,
        Page,
        Problem,
        ProblemItem,
        Progress,
        Recovery,
        Stage,
        State,
    )
    from recoup.schemas.report import (
        Alignment,
        AlignmentPoint,
        AlignmentState,
        Baseline,
        Change,
        Checkpoint,
        Choice,
        Composition,
        Cost,
        CostEstimate,
        DamageReport,
        Estimate,
        InContext,
        LayerDistance,
        Measure,
        OutputForm,
        PhaseReport,
        Provenance,
        RankCorrelation,
        Report,
        RewriteCounts,
        RolloutReport,
        Sample,
        Splits,
        Stopped,
        Teaching,
        TrainingPoint,
        TrainingReport,
        Trajectory,
        TriedRepair,
    )
    from recoup.schemas.request import (
        AlignmentSpec,
        BuiltinPrompts,
        ChangeRecovery,
        ComposedPrompts,
        CreateRecovery,
        Damage,
        DivergenceName,
        EvaluationSpec,
        FilePrompts,
        Gate,
        GenerationSpec,
        HarnessSpec,
        Limits,
        LoraSpec,
        Match,
        Method,
        MethodSpec,
        ModelRef,
        OutputSpec,
        RolloutSpec,
        TaskSpec,
        TeachSpec,
        TrainingSpec,
    )

_MODULES = {
    "dataset": "ChatRow Message Prompt PromptRow TextRow",
    "deployment": (
        "CreateDeployment Deployment DeploymentState EffectProbe Launch Lineage ProbeRow ReplicaStanding"
    ),
    "diagnosis": "CreateDiagnosis Diagnosis DiagnosisReport ExamSpec PositionsSpec",
    "plan": "DryRun",
    "recovery": (
        "HANDED_OVER TERMINAL_STATES Artifact Capabilities DeletedFile Event File JobError Outcome Page "
        "Problem ProblemItem Progress Recovery Stage State"
    ),
    "report": (
        "Alignment AlignmentPoint AlignmentState Baseline Change Checkpoint Choice Composition Cost "
        "CostEstimate DamageReport Estimate InContext LayerDistance Measure OutputForm PhaseReport "
        "Provenance RankCorrelation Report RewriteCounts RolloutReport Sample Splits Stopped Teaching "
        "TrainingPoint "
        "TrainingReport Trajectory TriedRepair"
    ),
    "request": (
        "AlignmentSpec BuiltinPrompts ChangeRecovery ComposedPrompts CreateRecovery Damage DivergenceName "
        "EvaluationSpec FilePrompts Gate GenerationSpec HarnessSpec Limits LoraSpec Match Method "
        "MethodSpec ModelRef OutputSpec RolloutSpec TaskSpec TeachSpec TrainingSpec"
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


__all__ = [
    "HANDED_OVER",
    "TERMINAL_STATES",
    "Alignment",
    "AlignmentPoint",
    "AlignmentSpec",
    "AlignmentState",
    "Artifact",
    "Baseline",
    "BuiltinPrompts",
    "Capabilities",
    "Change",
    "ChangeRecovery",
    "ChatRow",
    "Checkpoint",
    "Choice",
    "ComposedPrompts",
    "Composition",
    "Cost",
    "CostEstimate",
    "CreateDeployment",
    "CreateDiagnosis",
    "CreateRecovery",
    "Damage",
    "DamageReport",
    "DeletedFile",
    "Deployment",
    "DeploymentState",
    "Diagnosis",
    "DiagnosisReport",
    "DivergenceName",
    "DryRun",
    "EffectProbe",
    "Estimate",
    "EvaluationSpec",
    "Event",
    "ExamSpec",
    "File",
    "FilePrompts",
    "Gate",
    "GenerationSpec",
    "HarnessSpec",
    "InContext",
    "JobError",
    "Launch",
    "LayerDistance",
    "Limits",
    "Lineage",
    "LoraSpec",
    "Match",
    "Measure",
    "Message",
    "Method",
    "MethodSpec",
    "ModelRef",
    "Outcome",
    "OutputForm",
    "OutputSpec",
    "Page",
    "PhaseReport",
    "PositionsSpec",
    "ProbeRow",
    "Problem",
    "ProblemItem",
    "Progress",
    "Prompt",
    "PromptRow",
    "Provenance",
    "RankCorrelation",
    "Recovery",
    "ReplicaStanding",
    "Report",
    "RewriteCounts",
    "RolloutReport",
    "RolloutSpec",
    "Sample",
    "Splits",
    "Stage",
    "State",
    "Stopped",
    "TaskSpec",
    "TeachSpec",
    "Teaching",
    "TextRow",
    "TrainingPoint",
    "TrainingReport",
    "TrainingSpec",
    "Trajectory",
    "TriedRepair",
]
