"""A packed student's recovery as an adapter, as plain numbers, and packed again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from recoup.schemas import Report
from recoup_ml import forms, models, packed
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.recipe import recover
from recoup_ml.run import Run

pytestmark = pytest.mark.usefixtures("blank_pictures")
Student = Callable[[str], Path]
COSTLY = pytest.mark.slow
"""Another recovery each."""
IDS_BT = torch.arange(8, 40).view(2, 16)
SMALL = {
    "training": {"steps": 3},
    "evaluation": {
        "test_sequences": 40,
        "validation_sequences": 8,
        "gate": {"min_recovered": 0.0, "max_regression": 1.0},
    },
}


@pytest.fixture
def adapter(student: Student, tmp_path: Path) -> Path:
    """An adapter of the packed student that changes what it says."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        models.load(student("nf4")), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    return models.load(folder)(IDS_BT).logits


@torch.inference_mode()
def test_merged_it_is_plain_and_says_the_same(student: Student, adapter: Path, tmp_path: Path) -> None:
    forms.write(student("nf4"), adapter, "merged", tmp_path / "merged")
    assert packed.method(tmp_path / "merged") is None
    expected = models.load_trained(student("nf4"), adapter)(IDS_BT).logits
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


def test_packed_again_it_is_as_small_and_nearer_to_itself_than_the_student_was(
    student: Student, adapter: Path, tmp_path: Path
) -> None:
    for form in ("merged", "requantized"):
        forms.write(student("nf4"), adapter, form, tmp_path / form)
    again, before = tmp_path / "requantized", student("nf4")
    assert packed.settings(again).to_dict() == packed.settings(before).to_dict()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (again, before)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    merged = logits(tmp_path / "merged")
    assert 0 < (logits(again) - merged).norm() < (logits(before) - merged).norm()


def test_a_student_of_plain_numbers_has_no_other_forms(
    student: Student, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedRequest, match=r"output\.kind requantized.*not packed by bitsandbytes"):
        forms.write(student("rounded"), adapter, "requantized", tmp_path / "whole")


@pytest.mark.parametrize(
    "kind", [pytest.param("adapter", marks=COSTLY), "merged", pytest.param("requantized", marks=COSTLY)]
)
def test_a_report_says_what_every_form_costs(
    kind: str, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run, journal = make_run("nf4", output={"kind": kind}, **SMALL), open_journal(tmp_path)
    recover(run, journal)
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    by_form = {item.form: item for item in report.forms}
    assert [item.form for item in report.forms if item.handed_over] == [kind]
    assert by_form[kind].kl == pytest.approx(report.measures[0].after, rel=1e-4)
    assert by_form["merged"].kl == pytest.approx(by_form["adapter"].kl, rel=1e-3)
    assert by_form["requantized"].kl != pytest.approx(by_form["merged"].kl, rel=1e-3)
    assert by_form["requantized"].bytes < by_form["merged"].bytes


def test_a_recovered_student_is_handed_over_packed_again(
    student: Student, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    """Eight bits, so that packing again does not cost what a few steps on a tiny model bring."""
    model = AutoModelForCausalLM.from_pretrained(
        student("finetuned"), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model.save_pretrained(tmp_path / "packed")
    models.load_tokenizer(student("finetuned")).save_pretrained(tmp_path / "packed")
    asked = make_run("finetuned", output={"kind": "requantized"}, **(SMALL | {"training": {"steps": 24}}))
    journal = open_journal(tmp_path / "job")
    recover(replace(asked, student=tmp_path / "packed"), journal)
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    assert report.promoted, report.reason
    folder = journal.published["model/config.json"].parent
    assert packed.method(folder) == "bitsandbytes"
    assert not models.is_adapter(folder)


def test_other_students_have_one_form(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    journal = open_journal(tmp_path)
    recover(make_run("rounded", **SMALL), journal)
    assert Report.model_validate_json(journal.published["report.json"].read_text()).forms == []
