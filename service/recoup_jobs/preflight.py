"""Everything that can be known before a GPU is taken: all that is wrong, in one answer.

`preflight` runs where the request arrives, before a row is written, and again as the first
stage of the job. It never loads a tensor. A finding has the pointer of the field that is
to be changed. `look` finds the same and refuses nothing: that is what a dry run asks for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from recoup.schemas import (
    BuiltinPrompts,
    ComposedPrompts,
    CreateRecovery,
    FilePrompts,
    Match,
    ModelRef,
    ProblemItem,
    Prompt,
    TeachSpec,
)
from recoup.schemas.request import MODEL_KINDS, TEACHING_METHODS
from recoup_jobs.datasets import PromptSource, iter_prompts, require_kind
from recoup_jobs.errors import Unprocessable
from recoup_jobs.estimate import machine_of
from recoup_jobs.findings import Findings, refuse
from recoup_jobs.harness import task_file
from recoup_jobs.inspection import Inspections, Model
from recoup_jobs.ledger import Ledger
from recoup_jobs.machines import most_memory
from recoup_jobs.rows import RowKind
from recoup_jobs.settings import Settings

SMALL_BYTES = 1 << 30
"""A model that fits into any worker."""
FEWEST_PROMPTS = 48
"""Distinct ones: fewer cannot be split into training, validation and test."""
FEWEST_DEMONSTRATIONS, FEWEST_BESIDE, FEWEST_HELD_OUT = 24, 10, 10
"""Distinct ones of a skill: in one file that is split, or in two of which one is held out."""

PROMPTS = {FilePrompts: "file", BuiltinPrompts: "builtin", ComposedPrompts: "compose"}
"""The field that tells the kinds of `prompts` apart."""
FROM_REFERENCES = frozenset({"sft", "rewrite_sft", "self_demonstration"})
"""Methods that learn from the reference answers of `prompts`, or of `teach`."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Shelf:
    """The data sets that a request may name."""

    ledger: Ledger
    settings: Settings
    tenant: str | None
    """Whose they must be; None: anybody's."""

    def prompts(self, source: PromptSource) -> Iterator[Prompt]:
        return iter_prompts(self.ledger, self.settings, source, self.tenant)

    def require(self, source: FilePrompts, kind: RowKind) -> None:
        require_kind(self.ledger, source.file, kind, self.tenant)


@dataclass(frozen=True)
class Look:
    """What is known of a request's models, and what is wrong with the request."""

    student: Model | None
    teacher: Model | None
    findings: list[ProblemItem]


def preflight(
    request: CreateRecovery,
    ledger: Ledger,
    settings: Settings,
    tenant: str | None = None,
    inspections: Inspections | None = None,
) -> Look:
    """Raises `Unprocessable` with every finding.

    Args:
        tenant: whose files are there to be named; None, for a worker: anybody's.
        inspections: what a process that looks often has seen of model folders.
    """
    seen = look(request, ledger, settings, tenant, inspections)
    refuse(seen.findings)
    return seen


def look(
    request: CreateRecovery,
    ledger: Ledger,
    settings: Settings,
    tenant: str | None = None,
    inspections: Inspections | None = None,
) -> Look:
    findings = Findings()
    known = inspections or Inspections()
    student = _inspected(findings, "/student/source", request.student, settings, known)
    teacher = _inspected(findings, "/teacher/source", request.teacher, settings, known)
    if student and teacher:
        _compare(findings, student, teacher)
    if student:
        _check_layers(findings, request, student)
    if student and student.quantizer:
        _check_packed(findings, request, student.quantizer)
    elif student:
        _check_plain(findings, request)
    for pointer, model in (("/student/source", student), ("/teacher/source", teacher)):
        if model and model.tensors:
            with findings.at(pointer):
                _require_a_machine(model, ledger, settings.queue)
    if teacher and isinstance(request.prompts, ComposedPrompts):
        with findings.at("/prompts/compose"):
            _require_a_template(teacher)
    _check_data(findings, request, Shelf(ledger, settings, tenant))
    for index, task in enumerate(request.evaluation.harness):
        with findings.at(f"/evaluation/harness/{index}/name"):
            task_file(settings.harness_tasks, task.name)
    return Look(student, teacher, findings.items)


def _inspected(
    findings: Findings, pointer: str, ref: ModelRef, settings: Settings, known: Inspections
) -> Model | None:
    with findings.at(pointer):
        found = known.named(ref.source, settings.model_roots)
        findings.items += [ProblemItem(pointer=pointer, code=c, message=m) for c, m in found.faults]
        return found.model
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
    ours, theirs = (config_value(model, *HIDDEN_SIZE_KEYS) for model in (student, teacher))
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


def _require_a_template(teacher: Model) -> None:
    if teacher.chat_template is None:
        message = (
            "the teacher has no chat template, so there is no place where it would speak as a user; give "
            "`prompts` as a file"
        )
        raise Unprocessable("unsupported_request", message)


def _require_a_machine(model: Model, ledger: Ledger, queue: str) -> None:
    """Some worker of this class can hold the weights; where none has told of itself, one may come."""
    needed = machine_of(queue).loaded_bytes(model.parameters, model.stored_bytes)
    if needed < SMALL_BYTES:
        return
    there_is = most_memory(ledger, queue)
    if there_is is not None and needed > there_is:
        message = f"the weights alone take {needed >> 20} MiB; the largest {queue} has {there_is >> 20} MiB"
        raise Unprocessable("no_capable_worker", message)


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
    layers, depth = request.alignment.layers, config_value(student, *DEPTH_KEYS)
    if layers != "all" and isinstance(depth, int) and max(layers) >= depth:
        with findings.at("/alignment/layers"):
            message = (
                f"the student has {depth} decoder blocks, 0 to {depth - 1}; {max(layers)} is none of them"
            )
            raise Unprocessable("unsupported_request", message)


def _check_data(findings: Findings, request: CreateRecovery, shelf: Shelf) -> None:
    with findings.at(f"/prompts/{PROMPTS[type(request.prompts)]}"):
        if isinstance(request.prompts, FilePrompts):  # of the built-in ones there are enough
            _require_enough(shelf.prompts(request.prompts), FEWEST_PROMPTS, "prompts")
        if request.method.type in FROM_REFERENCES and request.teach is None:
            with findings.at("/method/type"):
                _require_a_reference(request.method.type, shelf.prompts(request.prompts))
    if request.teach is not None:
        _check_teaching(findings, request.teach, request.method.type, shelf)
    if request.keep is not None:
        with findings.at("/keep/file"):
            shelf.require(request.keep, "prompts")
    if request.evaluation.natural_text is not None:
        with findings.at("/evaluation/natural_text/file"):
            shelf.require(request.evaluation.natural_text, "text")
    for index, task in enumerate(request.evaluation.tasks):
        with findings.at(f"/evaluation/tasks/{index}/file"):
            _require_references(task.match, "a task", shelf.prompts(FilePrompts(file=task.file)))


def _check_teaching(findings: Findings, teach: TeachSpec, method: str, shelf: Shelf) -> None:
    with findings.at("/method/type"):
        if method not in TEACHING_METHODS:
            known = ", ".join(sorted(TEACHING_METHODS))
            raise Unprocessable("unsupported_request", f"{method} cannot teach a skill; {known} can")
    fewest = {"file": FEWEST_BESIDE if teach.held_out else FEWEST_DEMONSTRATIONS, "held_out": FEWEST_HELD_OUT}
    for field, least in fewest.items():
        if file := getattr(teach, field):
            with findings.at(f"/teach/{field}"):
                _require_references(teach.match, "teach", shelf.prompts(FilePrompts(file=file)))
                _require_enough(shelf.prompts(FilePrompts(file=file)), least, "demonstrations")


def _require_enough(prompts: Iterable[Prompt], least: int, called: str) -> None:
    distinct: set[str] = set()
    for prompt in prompts:
        distinct.add(prompt.model_dump_json(include={"messages"}))
        if len(distinct) >= least:
            return
    message = f"{len(distinct)} distinct {called} are too few; at least {least} are needed"
    raise Unprocessable("too_few_prompts", message)


def _require_a_reference(method: str, prompts: Iterable[Prompt]) -> None:
    """Rows without one are left out of such training; where none has one, nothing is left."""
    if not any(prompt.completion for prompt in prompts):
        message = (
            f"{method} learns from reference answers, and no prompt has one; "
            "give `prompts` as a file whose rows have a completion"
        )
        raise Unprocessable("missing_reference", message)


def _require_references(match: Match, what: str, prompts: Iterable[Prompt]) -> None:
    """A row without a right answer would be wrong whatever a model says."""
    for row, reference in enumerate((prompt.completion or "" for prompt in prompts), start=1):
        if not reference.strip():
            message = f"row {row} has no completion; each row of {what} needs one"
            raise Unprocessable("missing_reference", message)
        if match == "number" and not any(map(str.isnumeric, reference)):
            message = f"the completion of row {row} holds no number, by which match `number` compares"
            raise Unprocessable("missing_reference", message)


def config_value(model: Model, *names: str) -> Any:
    """The first of these keys that the configuration has, at its top or in its text part."""
    text = model.config.get("text_config")
    for part in (model.config, text if isinstance(text, dict) else {}):
        for name in names:
            if name in part:
                return part[name]
    return None


def _logits(model: Model) -> Any:
    return config_value(model, "vocab_size")


def _vocabulary(model: Model) -> str:
    tokens = "no tokenizer.json" if model.vocabulary is None else f"{model.vocabulary.size} tokens"
    return f"{tokens}, vocab_size {_shown(_logits(model))}"


def _shown(value: Any) -> str:
    return str(value)[:100]
