"""What a client sends: the body of `POST /v1/recoveries`.

`CreateRecovery` refuses unknown fields, coerces nothing and bounds everything; a
value that passed here needs no second look at its type further down.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

Damage = Literal["finetuning", "quantization", "pruning"]

Source = Annotated[
    str,
    StringConstraints(min_length=1, max_length=500, pattern=r"^[A-Za-z0-9/][A-Za-z0-9._/\-]*$"),
]
FileId = Annotated[str, StringConstraints(pattern=r"^file-[0-9a-f]{24}$")]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]
LayerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._\-]{0,63}$")]


class Input(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRef(Input):
    source: Source
    """A folder below one of the server's model roots: its name, or its absolute path."""


class FilePrompts(Input):
    file: FileId
    """An uploaded JSONL file: `{"messages": [...]}` or `{"prompt": "...", "completion": "..."}` a line."""


class BuiltinPrompts(Input):
    builtin: Literal["general"]
    """`general`: the prompts that come with Recoup, of fourteen kinds."""


def _prompts_tag(value: Any) -> str:
    named = value.keys() if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return "builtin" if "builtin" in named else "file"


Prompts = Annotated[
    Annotated[FilePrompts, Tag("file")] | Annotated[BuiltinPrompts, Tag("builtin")],
    Discriminator(_prompts_tag),
]


class MethodSpec(Input):
    type: Literal["auto", "off_policy"] = "auto"
    """`off_policy`: the teacher answers, the student learns the teacher's distribution on the answers."""
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Softens both distributions in the divergence; 1 is the distribution itself."""


class LoraSpec(Input):
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[int, Field(ge=1, le=2048)] = 32
    targets: Literal["auto"] | Annotated[list[LayerName], Field(min_length=1, max_length=32)] = "auto"
    """Names of the linear layers that get an adapter; `auto`: all of attention and MLP."""


class TrainingSpec(Input):
    mode: Literal["auto", "lora", "full"] = "auto"
    lora: LoraSpec = LoraSpec()
    steps: Literal["auto"] | Annotated[int, Field(ge=1, le=1_000_000)] = "auto"
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0.0, le=10.0)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Sequences an optimizer step."""
    max_length: Annotated[int, Field(ge=16, le=32_768)] = 1024
    """Tokens a sequence, prompt and answer together; a prompt that leaves too little room is dropped."""


class GenerationSpec(Input):
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Where the teacher's answer is cut."""


class Gate(Input):
    min_recovered: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """The lower bound that the recovered fraction must reach for `recovered`."""
    max_regression: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """The relative loss on a guarded measure beyond which the outcome is `regressed`."""


class EvaluationSpec(Input):
    natural_text: FilePrompts | None = None
    """Plain text for bits per character, `{"text": "..."}` a line; default: text that Python carries."""
    test_sequences: Annotated[int, Field(ge=16, le=10_000)] = 128
    """At most so many held-out prompts decide the verdict."""
    validation_sequences: Annotated[int, Field(ge=8, le=10_000)] = 64
    """At most so many choose the checkpoint."""
    gate: Gate = Gate()


class AlignmentSpec(Input):
    positions: Annotated[int, Field(ge=256, le=1_000_000)] = 4096
    """At most so many token positions enter CKA."""


class OutputSpec(Input):
    kind: Literal["auto", "adapter", "merged"] = "auto"
    """`adapter`: a PEFT folder for the student; `merged`: a whole model."""
    name: Name | None = None


class Limits(Input):
    wall_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """The job fails with `deadline_exceeded` past so many seconds of running."""


class CreateRecovery(Input):
    student: ModelRef
    """The damaged model."""
    teacher: ModelRef
    """Its healthy original."""
    damage: Literal["auto"] | Damage = "auto"
    prompts: Prompts = BuiltinPrompts(builtin="general")
    """General prompts on which ability is restored."""
    keep: FilePrompts | None = None
    """Prompts of the new skill that must not be lost; with a `completion` each they are scored by match."""
    method: MethodSpec = MethodSpec()
    training: TrainingSpec = TrainingSpec()
    generation: GenerationSpec = GenerationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    alignment: AlignmentSpec = AlignmentSpec()
    output: OutputSpec = OutputSpec()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = {}
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _fits_together(self) -> "CreateRecovery":
        if self.generation.max_new_tokens >= self.training.max_length:
            raise ValueError("generation.max_new_tokens must be less than training.max_length")
        if self.training.mode == "full" and self.output.kind == "adapter":
            raise ValueError("training.mode full gives a whole model, so output.kind cannot be adapter")
        return self
