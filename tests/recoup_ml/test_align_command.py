"""`recoup-server align`: two folders in, a table and four files out, and sentences where that cannot be."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from recoup.schemas import Prompt
from recoup_ml import cka, models
from recoup_server.align import BATCH, Comparison, Text, batches, read_texts, run_align
from recoup_server.cli import app

Student = Callable[[str], Path]


@pytest.fixture
def rows(prompts: list[Prompt], tmp_path: Path) -> Path:
    """Prompts of six kinds with their answers."""
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": item.messages[-1].content, "completion": item.completion} for item in prompts[:90]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def asked(student: Student, teacher: Path, rows: Path, tmp_path: Path) -> Comparison:
    return Comparison(
        student=student("pruned"),
        teacher=teacher,
        prompts=rows,
        out=tmp_path / "out",
        texts=80,
        tokens=32,
        max_length=64,
        completion_only=False,
        controls=True,
        pooled=False,
        seed=0,
    )


def test_it_prints_a_table_and_writes_its_files(
    asked: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_align(asked, as_json=False) == 0
    printed = capsys.readouterr()
    assert "CKA over" in printed.out
    assert len([line for line in printed.out.splitlines() if "±" in line]) == 5
    assert {path.name for path in asked.out.iterdir()} == {
        f"alignment.{suffix}" for suffix in ("json", "csv", "png", "svg", "safetensors")
    }
    layers = json.loads((asked.out / "alignment.json").read_text())["layers"]
    assert layers[0]["cka"] > layers[-1]["cka"] > layers[-1]["floor"]


def test_machines_read_json_on_stdout_alone(asked: Comparison, teacher: Path, tmp_path: Path) -> None:
    words = ["align", "--student", asked.student, "--teacher", teacher, "--out", tmp_path / "o", "--json"]
    result = CliRunner().invoke(app, [*map(str, words), "--prompts", str(asked.prompts), "--no-controls"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["texts"], found["layers"][0]["ceiling"]) == (90, None)


def test_texts_can_be_compared_by_their_means(asked: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_align(replace(asked, pooled=True, texts=64), as_json=False) == 0
    assert "CKA over the means of" in capsys.readouterr().out
    loaded = cka.Alignment.load(asked.out / "alignment.safetensors")
    assert loaded.pooled and loaded.texts == 64


def test_layers_that_were_dropped_are_matched_by_their_weights(asked: Comparison, student: Student) -> None:
    assert run_align(replace(asked, student=student("shallow"), controls=False), as_json=False) == 0
    layers = json.loads((asked.out / "alignment.json").read_text())["layers"]
    assert layers[-1]["student"] < layers[-1]["teacher"]


def test_texts_and_completions_can_be_compared_alone(
    asked: Comparison, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "red fox seven tree " * 40}) + "\n")
    cut = read_texts(replace(asked, prompts=tmp_path / "text.jsonl"), tokenizer)
    assert [len(text.ids) for text in cut] == [64, 64, 32]
    whole = read_texts(asked, tokenizer)
    answers = read_texts(replace(asked, completion_only=True), tokenizer)
    for one, other in zip(whole, answers, strict=True):
        assert one.ids == other.ids
        assert one.begin < other.begin < len(other.ids)


def test_what_all_texts_begin_with_counts_nowhere(
    asked: Comparison, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = read_texts(asked, tokenizer)
    begin = found[0].begin
    assert begin > 0
    assert len({text.ids[:begin] for text in found}) == 1
    assert len({text.ids[: begin + 1] for text in found}) > 1


@pytest.mark.parametrize("count", [2, BATCH, BATCH + 1, 3 * BATCH, 3 * BATCH + 1])
def test_no_batch_is_a_text_alone(count: int) -> None:
    texts = [Text(tuple(range(3 + index % 4)), 1) for index in range(count)]
    found = list(batches(texts, 0))
    assert sum(len(batch["input_ids"]) for batch in found) == count
    assert all(len(batch["input_ids"]) >= 2 for batch in found)
    first = found[0]
    assert torch.equal(
        first["attention_mask"].sum(1), torch.tensor([len(t.ids) for t in texts[: len(first["input_ids"])]])
    )
    assert not first["completion_mask"][:, 0].any()


def test_too_few_texts_are_refused_with_a_sentence(
    asked: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "copy : red fox"}\n')
    assert run_align(replace(asked, prompts=tmp_path / "one.jsonl"), as_json=False) == 1
    assert "1 texts are left" in capsys.readouterr().err


def test_a_line_that_is_no_row_is_named(
    asked: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "copy : red fox"}\n{"promt": 1}\n')
    assert run_align(replace(asked, prompts=tmp_path / "bad.jsonl"), as_json=False) == 1
    assert capsys.readouterr().err


def test_models_that_share_nothing_are_refused(
    asked: Comparison, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = models.load(teacher)
    wide.config.hidden_size = 64
    stranger = type(wide)(wide.config)
    stranger.save_pretrained(tmp_path / "stranger")
    assert run_align(replace(asked, student=tmp_path / "stranger"), as_json=False) == 1
    assert "larger than its" in capsys.readouterr().err
