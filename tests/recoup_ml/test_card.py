"""The model card: front matter that the hub can read, and the numbers beside the way to load it."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from recoup.schemas import Report
from recoup_ml.card import model_card
from recoup_ml.page import number

SAMPLES = json.loads((Path(__file__).parent / "sample_report.json").read_text("utf-8"))
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def recovered() -> Report:
    return Report.model_validate(SAMPLES["recovered"])


def front_matter(card: str) -> dict[str, object]:
    empty, matter, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter)


@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("merged", "transformers")])
def test_the_front_matter_names_library_base_and_damage(kind: str, library: str, recovered: Report) -> None:
    matter = front_matter(model_card(recovered, BASE, kind, "mended"))
    assert (matter["library_name"], matter["base_model"]) == (library, BASE)
    assert {"recoup", "finetuning"} <= set(matter["tags"])


@pytest.mark.parametrize("base", ["/models/a b: #1", 'quo"ted\\path', "yes", "1e3", "line\nbreak"])
def test_any_base_model_survives_yaml(base: str, recovered: Report) -> None:
    assert front_matter(model_card(recovered, base, "adapter", "mended"))["base_model"] == base


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_loading_snippet_is_python_and_names_the_model(kind: str, recovered: Report) -> None:
    snippet = re.search(r"```python\n(.*?)```", model_card(recovered, BASE, kind, "mended"), re.DOTALL)[1]
    strings = {node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)}
    assert "mended" in strings
    assert (BASE in strings) == (kind == "adapter")


def test_every_measure_has_its_row(recovered: Report) -> None:
    card = model_card(recovered, BASE, "merged", "mended")
    for measure in recovered.measures:
        row = next(line for line in card.splitlines() if line.startswith(f"| {measure.label}"))
        assert f"| {number(measure.teacher)} | {number(measure.before)} | {number(measure.after)} |" in row


def test_every_table_row_has_as_many_cells_as_its_head(recovered: Report) -> None:
    odd = recovered.measures[0].model_copy(update={"label": "one | two\nthree"})
    card = model_card(recovered.model_copy(update={"measures": [odd]}), BASE, "merged", "mended")
    rows = [line for line in card.split("## How to load")[0].splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}


def test_the_card_carries_what_a_repetition_needs(recovered: Report) -> None:
    card = model_card(recovered, BASE, "merged", "mended")
    facts = recovered.provenance
    for needed in (facts.student_sha256, facts.teacher_sha256, recovered.splits.prompts_sha256, "seed 0"):
        assert needed in card


def test_a_card_without_training_claims_none() -> None:
    card = model_card(Report.model_validate(SAMPLES["not_needed"]), BASE, "merged", "mended")
    assert "by distillation" not in card
    assert "| Training | none |" in card


def test_the_same_report_gives_the_same_card(recovered: Report) -> None:
    assert model_card(recovered, BASE, "adapter", "x") == model_card(recovered, BASE, "adapter", "x")
