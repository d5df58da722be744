"""Tasks of lm-evaluation-harness, where it is installed: each document's mark, asked of every model alike."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import HarnessSpec, Prompt, Report
from recoup_ml import harness
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.recipe import recover
from recoup_ml.results import HarnessScores
from recoup_ml.run import HarnessTask, Interrupted, Run
from recoup_ml.sequences import encode

has_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'recoup-server[harness]'"
)
pytestmark = [
    pytest.mark.usefixtures("blank_pictures"),
]

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
"""
WRITE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: [write.jsonl]}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def question(prompt: Prompt) -> str:
    return prompt.messages[0].content


@pytest.fixture(scope="module")
def rows(prompts: list[Prompt]) -> list[Prompt]:
    """Questions whose answer is one word."""
    return [prompt for prompt in prompts if len((prompt.completion or "").split()) == 1][:20]


@pytest.fixture
def folder(tmp_path: Path, rows: list[Prompt]) -> Path:
    """An operator's: `choice` and `write` ask the same, the first with three words to choose from."""
    draw = random.Random(0)
    answers = [row.completion for row in rows]
    wrong = [draw.sample(sorted(set(answers) - {answer}), 2) for answer in answers]
    files = {
        "choice": [
            {"question": question(row), "choices": [*others, row.completion], "answer": 2}
            for row, others in zip(rows, wrong, strict=True)
        ],
        "write": [{"question": question(row), "answer": row.completion} for row in rows],
    }
    for name, written in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(name="choice"))
    (tmp_path / "write.yaml").write_text(WRITE.format(name="write"))
    return tmp_path


def task(folder: Path, name: str, **spec: object) -> HarnessTask:
    return HarnessTask(HarnessSpec.model_validate({"name": name} | spec), folder / f"{name}.yaml")


@pytest.fixture
def marked(
    folder: Path, healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., HarnessScores]:
    """`marked("choice", limit=16)`: how the teacher does in the task."""

    def mark(name: str, model: PreTrainedModel = healthy, **spec: object) -> HarnessScores:
        return harness.scores(model, tokenizer, task(folder, name, **spec), lambda _done: None)

    return mark


def chosen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: Prompt, word: str) -> float:
    """log p(word) behind the question, by the chat template."""
    (ids,) = (item.ids for item in encode([row], tokenizer, 512))
    with torch.inference_mode():
        logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return float(logits_V.log_softmax(-1)[tokenizer.convert_tokens_to_ids(word)])


@has_lm_eval
def test_choices_are_marked_by_the_log_probabilities_behind_the_chat_template(
    marked: Callable[..., HarnessScores],
    folder: Path,
    rows: list[Prompt],
    healthy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    written = [json.loads(line) for line in (folder / "choice.jsonl").read_text().splitlines()]
    best = [
        max(item["choices"], key=lambda word, row=row: chosen(healthy, tokenizer, row, word))
        for item, row in zip(written, rows, strict=True)
    ]
    found = marked("choice")
    assert (found.metric, found.better) == ("acc,none", "higher")
    assert found.values == [float(word == row.completion) for word, row in zip(best, rows, strict=True)]
    assert sum(found.values) > 0


@has_lm_eval
def test_written_answers_are_marked_by_exact_match(
    marked: Callable[..., HarnessScores], make_model: Callable[..., PreTrainedModel]
) -> None:
    found = marked("write")
    assert found.metric == "exact_match,none"
    assert sum(found.values) > sum(marked("write", make_model(seed=5).eval()).values)


@has_lm_eval
def test_every_model_is_asked_the_same(
    marked: Callable[..., HarnessScores], make_model: Callable[..., PreTrainedModel], folder: Path
) -> None:
    asked = marked("choice").asked_sha256
    assert marked("choice", make_model(seed=5).eval()).asked_sha256 == asked
    (folder / "choice.jsonl").write_text((folder / "choice.jsonl").read_text().replace("red", "blue"))
    assert marked("choice").asked_sha256 != asked


@has_lm_eval
def test_limit_shots_and_metric_are_those_of_the_request(marked: Callable[..., HarnessScores]) -> None:
    whole, first = marked("choice"), marked("choice", limit=16)
    assert first.values == whole.values[:16] and len(whole.values) == 20
    assert marked("choice", shots=2).asked_sha256 != whole.asked_sha256
    assert marked("choice", metric="acc_norm").metric == "acc_norm,none"


@has_lm_eval
@pytest.mark.parametrize(
    ("name", "file", "why", "spec"),
    [
        ("hub", "task: hub\ndataset_path: ai2_arc\noutput_type: multiple_choice\n", "local files", {}),
        ("far", CHOICE.format(name="far").replace("choice.jsonl", "https://a.b/c.jsonl"), "local files", {}),
        ("gone", CHOICE.format(name="gone").replace("choice.jsonl", "gone.jsonl"), "cannot load", {}),
        ("other", CHOICE.format(name="another"), "task: other", {}),
        ("broken", "task: [", "task: broken", {}),
        ("f1", CHOICE.format(name="f1"), "those are: acc, acc_norm", {"metric": "f1"}),
        ("filter", CHOICE.format(name="filter"), "the filters none", {"metric": "acc,strict"}),
    ],
)
def test_what_cannot_be_measured_is_refused(
    marked: Callable[..., HarnessScores], folder: Path, name: str, file: str, why: str, spec: dict[str, str]
) -> None:
    (folder / f"{name}.yaml").write_text(file)
    with pytest.raises(UnsupportedRequest, match=why):
        marked(name, **spec)


@has_lm_eval
def test_it_can_be_stopped_between_two_passes_and_leaves_the_model_alone(
    folder: Path, healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    passes: list[int] = []

    def stop(done: int) -> None:
        passes.append(done)
        if len(passes) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        harness.scores(healthy, tokenizer, task(folder, "choice"), stop)
    assert passes == [0, 0]
    healthy(input_ids=torch.tensor([[3, 4]]))
    assert len(passes) == 2


@has_lm_eval
def test_nothing_random_goes_on_elsewhere_than_without_it(marked: Callable[..., HarnessScores]) -> None:
    torch.manual_seed(7)
    without = torch.rand(3)
    torch.manual_seed(7)
    marked("choice")
    assert torch.equal(torch.rand(3), without)


@has_lm_eval
def test_a_recovery_measures_it_before_and_after_and_guards_it(
    make_run: Callable[..., Run], open_journal: type, folder: Path, tmp_path: Path
) -> None:
    asked = [task(folder, "choice", limit=64), task(folder, "write")]
    gate = {"max_regression": 1.0}
    run = make_run("forgetful", training={"steps": 24}, evaluation={"test_sequences": 32, "gate": gate})
    journal = open_journal(tmp_path / "journal")
    recover(replace(run, harness=asked), journal)
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    found = {item.name: item for item in report.measures}
    choice, write = found["harness:choice"], found["harness:write"]
    assert (choice.n, choice.guarded, choice.label) == (20, True, "choice, acc")
    assert write.label == "write, exact_match"
    assert write.before < write.teacher and write.before < write.after
    assert write.recovered.low is not None


def test_without_the_harness_a_worker_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedRequest, match=r"recoup-server\[harness\]"):
        harness.installed([task(folder, "choice")])
    assert harness.installed([]) == []
