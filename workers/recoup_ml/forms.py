"""The forms in which a packed student's recovery can be handed over, and what each of them costs.

    adapter      the packed weights as they are, and beside them what was trained
    merged       both added up in plain numbers: as near to the teacher, several times as large
    requantized  the sum, packed as the student was: small and whole, but rounded once more, which
                 takes part of the recovery away (the dequantize, train, requantize path of QAD,
                 arXiv 2601.20088)

All are measured on the test split, whichever is handed over; the verdict is on that one. Only
what bitsandbytes packed can be unpacked here.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from recoup.schemas import Measure, OutputForm
from recoup_ml import models, packed
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.plan import Form

FORMS: tuple[Form, ...] = get_args(Form)


def can_change(student: Path) -> bool:
    """Whether the student is packed in a way that can be undone and done again here."""
    return packed.method(student) == "bitsandbytes"


def write(student: Path, adapter: Path, form: Form, folder: Path) -> None:
    """Writes student and adapter to `folder` as one whole model, `merged` or `requantized`.

    Raises:
        UnsupportedRequest: the student is not packed by bitsandbytes.
    """
    if not can_change(student):
        raise UnsupportedRequest(f"output.kind {form}: {student.name} is not packed by bitsandbytes.")
    if form == "merged":
        _save_merged(student, adapter, folder)
        return
    with TemporaryDirectory(dir=folder.parent) as aside:
        _save_merged(student, adapter, Path(aside))
        _pack(Path(aside), student).save_pretrained(folder)


def load(student: Path, adapter: Path, form: Form, aside: Path) -> tuple[PreTrainedModel, int]:
    """The recovered student in that form, and its bytes as files; a whole model is written to `aside`."""
    if form == "adapter":
        return models.load_trained(student, adapter), _bytes(student) + _bytes(adapter)
    write(student, adapter, form, aside)
    return models.load(aside), _bytes(aside)


def measured(
    student: Path, adapter: Path, chosen: Form, measure: Callable[[PreTrainedModel], Measure]
) -> list[OutputForm]:
    """What every form costs; `chosen` is the one that is handed over."""
    found = []
    for form in FORMS:
        with TemporaryDirectory(dir=adapter.parent) as aside:
            model, size = load(student, adapter, form, Path(aside))
            kl = measure(model)
        models.release()
        found.append(
            OutputForm(form=form, kl=kl.after, recovered=kl.recovered, bytes=size, handed_over=form == chosen)
        )
    return found


def _save_merged(student: Path, adapter: Path, folder: Path) -> None:
    plain = models.load(student).dequantize()
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    merged.save_pretrained(folder, save_original_format=False)  # its original format was the packed one


def _pack(plain: Path, like: Path) -> PreTrainedModel:
    """The model in `plain`, packed with the settings of the model in `like`."""
    return AutoModelForCausalLM.from_pretrained(
        plain,
        dtype="auto",
        quantization_config=packed.settings(like),
        local_files_only=True,
        use_safetensors=True,
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
