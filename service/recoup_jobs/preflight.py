"""Everything that can be known before a GPU is taken: all that is wrong, in one answer.

`preflight` runs where the request arrives, before a row is written, and again as the first
stage of the job. It never loads a tensor. A finding has the pointer of the field that is
to be changed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.schemas import BuiltinPrompts, CreateRecovery, FilePrompts, ModelRef, TaskSpec
from recoup.schemas.request import MODEL_KINDS
from recoup_jobs.datasets import iter_prompts, require_kind
from recoup_jobs.errors import Unprocessable
from recoup_jobs.findings import Findings
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_jobs.sources import (
    check_weights,
    locate,
    read_chat_template,
    read_config,
    read_quantizer,
    read_vocabulary,
    refuse_remote_code,
)

FEWEST_PROMPTS = 48
"""Distinct ones: fewer cannot be split into training, validation and test."""

FROM_REFERENCES = frozenset({"sft", "rewrite_sft", "self_demonstration"})
"""Methods that learn from the reference answers of `prompts`."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class ModelFolders:
    """Where the two models lie, links resolved."""

    student: Path
    teacher: Path


@dataclass(frozen=True)
class Model:
    """What the folder of one model says about it."""

    path: Path
    config: dict[str, Any]
    quantizer: str | None
    """Which method packed its weights, if one did."""
    vocabulary: dict[str, int] | None
    chat_template: Any


def preflight(request: CreateRecovery, ledger: Ledger, settings: Settings) -> ModelFolders:
    """The folders to work with; raises `Unprocessable` with every finding."""
    findings = Findings()
    student = _inspect(findings, "/student/source", request.student, settings)
    teacher = _inspect(findings, "/teacher/source", request.teacher, settings)
    if student and teacher:
        _compare(findings, student, teacher)
    if student:
        _check_layers(findings, request, student)
    if student and student.quantizer:
        _check_packed(findings, request, student.quantizer)
    elif student:
        _check_plain(findings, request)
    _check_data(findings, request, ledger, settings)
    findings.raise_if_any()
    assert student and teacher, "a model that could not be read is a finding"
    return ModelFolders(student.path, teacher.path)


def _inspect(findings: Findings, pointer: str, ref: ModelRef, settings: Settings) -> Model | None:
    with findings.at(pointer):
        folder = locate(ref.source, settings.model_roots)
        with findings.at(pointer):
            refuse_remote_code(folder)
        with findings.at(pointer):
            check_weights(folder)
        config, vocabulary = read_config(folder), read_vocabulary(folder)
        return Model(folder.path, config, read_quantizer(config), vocabulary, read_chat_template(folder))
    return None


def _compare(findings: Findings, student: Model, teacher: Model) -> None:
    for check in (
        _require_same_architecture,
        _require_same_width,
        _require_same_vocabulary,
        _require_same_template,
    ):
        with findings.at("/student/source"):
            check(student, teacher)


def _require_same_architecture(student: Model, teacher: Model) -> None:
    ours, theirs = (model.config.get("architectures") for model in (student, teacher))
    if ours != theirs:
        message = (
            f"the student is {_shown(ours)}, the teacher {_shown(theirs)}; both must be of one architecture"
        )
        raise Unprocessable("incompatible_architectures", message)


def _require_same_width(student: Model, teacher: Model) -> None:
    ours, theirs = (_config_value(model, *HIDDEN_SIZE_KEYS) for model in (student, teacher))
    if ours != theirs:
        message = f"hidden size {_shown(ours)} of the student is not the teacher's {_shown(theirs)}"
        raise Unprocessable("incompatible_models", message)


def _require_same_vocabulary(student: Model, teacher: Model) -> None:
    """Distillation compares distributions over tokens, so a token must be the same thing to both."""
    ours, theirs = student.vocabulary, teacher.vocabulary
    if (ours is None or theirs is None or ours == theirs) and _logits(student) == _logits(teacher):
        return
    message = (
        f"the student's vocabulary ({_vocabulary(student)}) is not the teacher's ({_vocabulary(teacher)}); "
        "off_policy compares them token by token, so this pair needs a method that works on text"
    )
    raise Unprocessable("vocabulary_mismatch", message)


def _require_same_template(student: Model, teacher: Model) -> None:
    if student.chat_template != teacher.chat_template:
        message = (
            "student and teacher have different chat templates; give both the one they were trained with"
        )
        raise Unprocessable("chat_template_mismatch", message)


def _check_plain(findings: Findings, request: CreateRecovery) -> None:
    with findings.at("/output/kind"):
        if request.output.kind == "requantized":
            message = "the student's weights are not packed, so nothing says how to pack them; use merged"
            raise Unprocessable("unsupported_request", message)


def _check_packed(findings: Findings, request: CreateRecovery, quantizer: str) -> None:
    """Packed weights have no gradient; only what bitsandbytes packed can be unpacked, and packed again."""
    packed = f"the student's weights are packed by {quantizer} and stay as they are"
    with findings.at("/training/mode"):
        if request.training.mode in MODEL_KINDS:
            message = f"{packed}, so training.mode {request.training.mode} cannot be; use lora, or auto"
            raise Unprocessable("unsupported_request", message)
    with findings.at("/output/kind"):
        if request.output.kind in {"merged", "requantized"} and quantizer != "bitsandbytes":
            message = f"{packed}, so no adapter can be merged into them; use adapter, or auto"
            raise Unprocessable("unsupported_request", message)


def _check_layers(findings: Findings, request: CreateRecovery, student: Model) -> None:
    layers, depth = request.alignment.layers, _config_value(student, *DEPTH_KEYS)
    if layers != "all" and isinstance(depth, int) and max(layers) >= depth:
        with findings.at("/alignment/layers"):
            message = (
                f"the student has {depth} decoder blocks, 0 to {depth - 1}; {max(layers)} is none of them"
            )
            raise Unprocessable("unsupported_request", message)


def _check_data(findings: Findings, request: CreateRecovery, ledger: Ledger, settings: Settings) -> None:
    with findings.at("/prompts/builtin" if isinstance(request.prompts, BuiltinPrompts) else "/prompts/file"):
        _require_enough(request.prompts, ledger, settings)
    if request.method.type in FROM_REFERENCES:
        with findings.at("/method/type"):
            _require_a_reference(request, ledger, settings)
    if request.keep is not None:
        with findings.at("/keep/file"):
            require_kind(ledger, request.keep.file, "prompts")
    if request.evaluation.natural_text is not None:
        with findings.at("/evaluation/natural_text/file"):
            require_kind(ledger, request.evaluation.natural_text.file, "text")
    for index, task in enumerate(request.evaluation.tasks):
        with findings.at(f"/evaluation/tasks/{index}/file"):
            _require_references(task, ledger, settings)


def _require_enough(source: FilePrompts | BuiltinPrompts, ledger: Ledger, settings: Settings) -> None:
    distinct: set[str] = set()
    for prompt in iter_prompts(ledger, settings, source):
        distinct.add(prompt.model_dump_json(include={"messages"}))
        if len(distinct) >= FEWEST_PROMPTS:
            return
    message = f"{len(distinct)} distinct prompts are too few; at least {FEWEST_PROMPTS} are needed"
    raise Unprocessable("too_few_prompts", message)


def _require_a_reference(request: CreateRecovery, ledger: Ledger, settings: Settings) -> None:
    """Rows without one are left out of such training; where none has one, nothing is left."""
    if not any(prompt.completion for prompt in iter_prompts(ledger, settings, request.prompts)):
        message = (
            f"{request.method.type} learns from reference answers, and no prompt has one; "
            "give `prompts` as a file whose rows have a completion"
        )
        raise Unprocessable("missing_reference", message)


def _require_references(task: TaskSpec, ledger: Ledger, settings: Settings) -> None:
    """A row without a right answer would be wrong whatever a model says."""
    prompts = iter_prompts(ledger, settings, FilePrompts(file=task.file))
    for row, reference in enumerate((prompt.completion or "" for prompt in prompts), start=1):
        if not reference.strip():
            raise Unprocessable("missing_reference", f"row {row} has no completion; a task needs one in each")
        if task.match == "number" and not any(map(str.isnumeric, reference)):
            message = f"the completion of row {row} holds no number, by which match `number` compares"
            raise Unprocessable("missing_reference", message)


def _config_value(model: Model, *names: str) -> Any:
    """The first of these keys that the configuration has, at its top or in its text part."""
    text = model.config.get("text_config")
    for part in (model.config, text if isinstance(text, dict) else {}):
        for name in names:
            if name in part:
                return part[name]
    return None


def _logits(model: Model) -> Any:
    return _config_value(model, "vocab_size")


def _vocabulary(model: Model) -> str:
    tokens = "no tokenizer.json" if model.vocabulary is None else f"{len(model.vocabulary)} tokens"
    return f"{tokens}, vocab_size {_shown(_logits(model))}"


def _shown(value: Any) -> str:
    return str(value)[:100]
