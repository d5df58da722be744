"""What a client sends: the body of `POST /v1/recoveries`.

`CreateRecovery` refuses unknown fields, coerces nothing and bounds everything; a
value that passed here needs no second look at its type further down.

Importing this must cost little: models are built at their first use (`defer_build`), and
defaults that are models are made by `model_construct`, which needs none to be built.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

Damage = Literal["finetuning", "quantization", "pruning"]

Source = Annotated[
    str,
    StringConstraints(min_length=1, max_length=500, pattern=r"^[A-Za-z0-9/][A-Za-z0-9._/\-]*$"),
]
FileId = Annotated[str, StringConstraints(pattern=r"^file-[0-9a-f]{24}$")]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]
LayerIndex = Annotated[int, Field(ge=0, le=9999)]
LayerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._\-]{0,63}$")]
TaskName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_\-]{1,32}$")]
HarnessName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]{1,64}(,[A-Za-z0-9_\-]{1,64})?$")]


class Input(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class ModelRef(Input):
    source: Source
    """A folder below one of the server's model roots: its name, or its absolute path."""


class FilePrompts(Input):
    file: FileId
    """An uploaded JSONL file: `{"messages": [...]}` or `{"prompt": "...", "completion": "..."}` a line."""


class BuiltinPrompts(Input):
    builtin: Literal["general"]
    """`general`: the prompts that come with Recoup, of fourteen kinds."""


class ComposedPrompts(Input):
    """The teacher writes prompts itself, going on where its chat template lets a user speak."""

    compose: Annotated[int, Field(ge=80, le=100_000)]
    """How many distinct ones; fewer, where five times so many draws hold no more."""
    temperature: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    max_tokens: Annotated[int, Field(ge=8, le=4096)] = 128
    """One that has not ended by then is left out."""


def _prompts_tag(value: Any) -> str:
    named = value.keys() if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return next((tag for tag in ("builtin", "compose") if tag in named), "file")


Prompts = Annotated[
    Annotated[FilePrompts, Tag("file")]
    | Annotated[BuiltinPrompts, Tag("builtin")]
    | Annotated[ComposedPrompts, Tag("compose")],
    Discriminator(_prompts_tag),
]


Method = Literal[
    "off_policy",
    "on_policy",
    "two_stage",
    "self_demonstration",
    "rewrite_sft",
    "sft",
    "interpolate",
    "spectral",
    "restore_layers",
    "low_rank_patch",
    "reconstruct",
]
"""How a student is recovered.

Trained on distributions: `off_policy` (the teacher answers, the student learns the teacher's
distribution on the answers), `on_policy` (the student answers, the teacher scores every token),
`two_stage` (the one, then the other while it still gains), `self_demonstration` (as `on_policy`, by
a teacher that is shown the reference answer).
Trained on text: `rewrite_sft` (the teacher puts reference answers into its own words), `sft`
(the references as they are: the baseline).
Without training: `interpolate`, `spectral`, `restore_layers` for fine-tuning, `low_rank_patch`
for quantization, `reconstruct` for pruning.
"""
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]
TEACHING_METHODS = frozenset({"auto", "rewrite_sft", "self_demonstration", "sft"})
"""Those by which a skill can be taught: they learn from demonstrated answers."""
MODEL_KINDS = frozenset({"full", "norms"})
"""Training modes that give a whole model, not an adapter."""


class RolloutSpec(Input):
    """How the student answers in `on_policy`, `two_stage` and `self_demonstration`."""

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """0 is greedy."""
    max_new_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=8192)] = "auto"
    """Where an answer is cut; `auto`: at `generation.max_new_tokens`."""
    refresh_steps: Annotated[int, Field(ge=1, le=1000)] = 4
    """The student as it is answers for so many steps at once."""
    skip_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    """First answer tokens that do not enter the loss."""


class MethodSpec(Input):
    type: Literal["auto"] | Method = "auto"
    divergence: Literal["auto"] | DivergenceName = "auto"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The teacher's weight in the mixture of `jsd` (default 0.5) or `skew_kl` (default 0.1)."""
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Softens both distributions in the divergence; 1 is the distribution itself."""
    top_k: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Keep only the teacher's likeliest tokens and the rest as one; null: the whole distribution."""
    rollouts: RolloutSpec = RolloutSpec.model_construct()
    teacher: Literal["frozen", "ema"] = "frozen"
    """Who scores in `self_demonstration`: the teacher as it was or, where a healthy model is taught, the
    exponential moving average of its own weights, renewed after every step."""
    ema_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The present weights' share in each renewal (default 0.02); at 1 the model as it is teaches itself."""


MOST_RANK = 512
"""Of an adapter: vLLM serves no higher one."""


class LoraSpec(Input):
    rank: Annotated[int, Field(ge=1, le=MOST_RANK)] = 16
    alpha: Annotated[int, Field(ge=1, le=2048)] = 32
    targets: Literal["auto"] | Annotated[list[LayerName], Field(min_length=1, max_length=32)] = "auto"
    """Names of the linear layers that get an adapter; `auto`: all of attention and MLP."""
    allocation: Literal["uniform", "damage"] = "uniform"
    """`damage`: the same number of parameters in all, spent by how far each layer is from the teacher's."""


class TrainingSpec(Input):
    mode: Literal["auto", "lora", "dora", "full", "norms"] = "auto"
    """`norms`: only norms and biases train. A pruned student's zeros stay zero in every merged model."""
    lora: LoraSpec = LoraSpec.model_construct()
    steps: Literal["auto"] | Annotated[int, Field(ge=1, le=1_000_000)] = "auto"
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0.0, le=10.0)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Sequences an optimizer step."""
    max_length: Annotated[int, Field(ge=16, le=32_768)] = 1024
    """Tokens a sequence, prompt and answer together; a prompt that leaves too little room is dropped."""
    start: Literal["auto", "student", "repair"] = "auto"
    """From the student as it is, or from its best training-free repair; `auto`: whichever is nearer on
    validation, but for fine-tuning the student, whose new skill a repair in weight space would wear away."""
    learn_prompts: Literal["auto"] | bool = "auto"
    """Whether the teacher's distributions on its prompts are learnt beside those on its answers, but for the
    tokens with which all prompts begin; `auto`: against pruning, unless `method.top_k` is set."""
    stop_early: bool = True
    """Stop when the gap is closed, when validation gets worse than before training, or on a plateau."""


class GenerationSpec(Input):
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Where the teacher's answer is cut."""


class Gate(Input):
    min_recovered: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """The lower bound that the recovered fraction must reach for `recovered`."""
    max_regression: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """The relative loss on a guarded measure beyond which the outcome is `regressed`, or of a teaching
    `taught_with_forgetting`."""
    max_drift: Annotated[float, Field(ge=0.0, le=100.0)] = 0.1
    """Of a teaching: nats a token by which the model may move from what it was, on general prompts."""


Match = Literal["exact", "contains", "number"]
"""When an answer is right.

`exact`: it is the reference, white space at both ends aside. `contains`: the reference stands in it as
whole words, whatever their case. `number`: its last number is the reference's last number.
"""


class TeachSpec(Input):
    """A new skill for a healthy model, as demonstrations: prompts with the answer that is wanted."""

    file: FileId
    """An uploaded JSONL file of demonstrations; every row carries its answer."""
    held_out: FileId | None = None
    """Demonstrations that are never trained on and decide whether the skill was learnt; default: a fifth of
    `file`, by hash."""
    match: Match = "exact"
    """When an answer to a held-out demonstration is right."""
    rehearse: bool = True
    """Every step also holds the model to its own distribution on general prompts; it doubles the work."""

    @model_validator(mode="after")
    def _differ(self) -> "TeachSpec":
        if self.held_out == self.file:
            raise ValueError("held_out must be another file than file")
        return self


class TaskSpec(Input):
    """Prompts with one right answer each, answered greedily by teacher and student."""

    name: TaskName
    file: FileId
    """An uploaded JSONL file of prompts whose rows all carry a reference answer."""
    match: Match = "exact"
    max_new_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=8192)] = "auto"
    """Where an answer is cut; `auto`: it has room for the longest reference, and where it need not be
    exact, at least for `generation.max_new_tokens`."""


class HarnessSpec(Input):
    """A task of lm-evaluation-harness whose file the server's operator has put there."""

    name: HarnessName
    limit: Annotated[int, Field(ge=16, le=10_000)] = 256
    """At most so many of its documents, the first ones."""
    shots: Annotated[int, Field(ge=0, le=64)] | None = None
    """Answered examples before each question; null: as many as the task's file says."""
    metric: MetricName | None = None
    """One of the task's that is a mean over documents, as `acc_norm` or, with the filter whose answers it
    marks, `exact_match,strict-match`; null: the first."""


class EvaluationSpec(Input):
    baselines: bool = True
    """Measure the training-free repairs of this damage beside the trained student."""
    natural_text: FilePrompts | None = None
    """Plain text for bits per character, `{"text": "..."}` a line; default: text that Python carries."""
    tasks: Annotated[list[TaskSpec], Field(max_length=8)] = []
    """Each is a guarded measure; what stands in one is not trained on."""
    task_rows: Annotated[int, Field(ge=16, le=10_000)] = 256
    """At most so many rows of a task are asked, chosen by hash."""
    harness: Annotated[list[HarnessSpec], Field(max_length=8)] = []
    """Each is a guarded measure; their documents are the operator's, and never trained on."""
    test_sequences: Annotated[int, Field(ge=16, le=10_000)] = 128
    """At most so many held-out prompts decide the verdict."""
    validation_sequences: Annotated[int, Field(ge=8, le=10_000)] = 64
    """At most so many choose the checkpoint."""
    gate: Gate = Gate.model_construct()

    @field_validator("tasks", "harness")
    @classmethod
    def _differ(cls, tasks: list[TaskSpec] | list[HarnessSpec]) -> list[TaskSpec] | list[HarnessSpec]:
        if len({task.name for task in tasks}) < len(tasks):
            raise ValueError("every task must have a name of its own")
        return tasks


class AlignmentSpec(Input):
    positions: Annotated[int, Field(ge=256, le=32_768)] = 4096
    """At most so many token positions enter CKA; its time grows with their square."""
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Measure it on validation prompts during training, too: at each validation, and after every so many
    steps. That changes nothing about the training."""
    weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Of 1 - CKA in the training loss; above 0 the teacher stands beside the student and is run along."""
    hidden_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Of the relative squared distance of hidden states in the training loss, likewise."""
    layers: Literal["all"] | Annotated[list[LayerIndex], Field(min_length=1, max_length=1000)] = "all"
    """Which of the student's decoder blocks, from 0, the two weights act on."""


class OutputSpec(Input):
    kind: Literal["auto", "adapter", "merged", "requantized"] = "auto"
    """`adapter`: a PEFT folder for the student; `merged`: a whole model, of plain numbers; `requantized`: a
    whole model, packed as the student was. A packed student's report says what each of them costs."""
    name: Name | None = None
    servable: bool = False
    """Refuse what vLLM could not serve, before it is trained; else a dry run and the job's log warn of it."""


class Limits(Input):
    wall_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """The job fails with `deadline_exceeded` past so many seconds of running."""


class CreateRecovery(Input):
    student: ModelRef
    """The damaged model; with `teach`, a healthy one."""
    teacher: ModelRef
    """Its healthy original; with `teach`, the same model."""
    damage: Literal["auto"] | Damage = "auto"
    prompts: Prompts = BuiltinPrompts.model_construct(builtin="general")
    """General prompts on which ability is restored."""
    keep: FilePrompts | None = None
    """Prompts of the new skill that must not be lost; with a `completion` each they are scored by match."""
    teach: TeachSpec | None = None
    """A new skill: the student, healthy and its own teacher, learns it and keeps what it could."""
    method: MethodSpec = MethodSpec.model_construct()
    training: TrainingSpec = TrainingSpec.model_construct()
    generation: GenerationSpec = GenerationSpec.model_construct()
    evaluation: EvaluationSpec = EvaluationSpec.model_construct()
    alignment: AlignmentSpec = AlignmentSpec.model_construct()
    output: OutputSpec = OutputSpec.model_construct()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = {}
    limits: Limits = Limits.model_construct()

    @model_validator(mode="after")
    def _fits_together(self) -> "CreateRecovery":
        if self.generation.max_new_tokens >= self.training.max_length:
            raise ValueError("generation.max_new_tokens must be less than training.max_length")
        if self.training.mode in MODEL_KINDS and self.output.kind == "adapter":
            raise ValueError(
                f"training.mode {self.training.mode} gives a whole model, so output.kind cannot be adapter"
            )
        if self.method.beta is not None and self.method.divergence not in {"jsd", "skew_kl"}:
            raise ValueError("method.beta belongs to method.divergence jsd or skew_kl")
        return self

    @model_validator(mode="after")
    def _moves_its_teacher_where_it_may(self) -> "CreateRecovery":
        if self.method.teacher == "frozen":
            if self.method.ema_rate is not None:
                raise ValueError("method.ema_rate belongs to method.teacher ema")
            return self
        if self.method.type != "self_demonstration":
            raise ValueError("method.teacher ema belongs to method.type self_demonstration")
        if self.teach is None:
            raise ValueError(
                "method.teacher ema belongs to teach: a recovery's target is what the healthy original does, "
                "and a teacher that moves with the damaged student is not that"
            )
        return self

    @model_validator(mode="after")
    def _teaches_a_healthy_model(self) -> "CreateRecovery":
        if self.teach is None:
            return self
        if self.student.source != self.teacher.source:
            raise ValueError("with teach a healthy model is its own teacher: name it as student and teacher")
        if self.damage != "auto":
            raise ValueError("with teach the student is healthy, so damage must be auto")
        if self.training.start == "repair":
            raise ValueError("with teach there is nothing to repair, so training.start cannot be repair")
        return self


class ChangeRecovery(Input):
    """What may change once a recovery exists; what is not given stays."""

    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    """Replaces all pairs."""
