"""What a request may ask for, before it is sent."""

import pytest
from pydantic import ValidationError

from recoup.schemas import CreateRecovery, EvaluationSpec

FILE = "file-" + "0" * 24


def evaluation(*tasks: dict[str, object]) -> EvaluationSpec:
    asked = {"student": {"source": "a"}, "teacher": {"source": "b"}, "evaluation": {"tasks": [*tasks]}}
    return CreateRecovery.model_validate(asked).evaluation


def test_a_task_needs_a_name_and_a_file_alone():
    (task,) = evaluation({"name": "sums", "file": FILE}).tasks
    assert (task.match, task.max_new_tokens) == ("exact", "auto")
    assert evaluation().tasks == []


@pytest.mark.parametrize(
    ("tasks", "place"),
    [
        ([{"name": "sums", "file": FILE}, {"name": "sums", "file": FILE, "match": "number"}], ()),
        ([{"name": f"t{number}", "file": FILE} for number in range(9)], ()),
        ([{"name": "My sums", "file": FILE}], (0, "name")),
        ([{"name": "task:sums", "file": FILE}], (0, "name")),
        ([{"name": "sums", "file": "sums.jsonl"}], (0, "file")),
        ([{"name": "sums", "file": FILE, "match": "regex"}], (0, "match")),
    ],
)
def test_tasks_that_cannot_be_told_apart_or_read_are_refused(tasks, place):
    with pytest.raises(ValidationError) as refused:
        evaluation(*tasks)
    (error,) = refused.value.errors()
    assert error["loc"] == ("evaluation", "tasks", *place)


OTHER = "file-" + "1" * 24


def teaching(**changes: object) -> CreateRecovery:
    asked = {"student": {"source": "a"}, "teacher": {"source": "a"}, "teach": {"file": FILE}}
    return CreateRecovery.model_validate(asked | changes)


def test_a_teaching_needs_a_file_alone():
    spec = teaching().teach
    assert (spec.held_out, spec.match, spec.rehearse) == (None, "exact", True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": {"source": "b"}}, "its own teacher"),
        ({"damage": "pruning"}, "healthy"),
        ({"training": {"start": "repair"}}, "nothing to repair"),
        ({"teach": {"file": FILE, "held_out": FILE}}, "another file"),
        ({"teach": {"held_out": OTHER}}, "Field required"),
    ],
)
def test_a_teaching_is_of_a_healthy_model(changes, words):
    with pytest.raises(ValidationError, match=words):
        teaching(**changes)


EMA = {"type": "self_demonstration", "teacher": "ema"}


def test_a_healthy_model_may_be_taught_by_its_own_average():
    assert teaching().method.teacher == "frozen"
    assert teaching(method=EMA).method.ema_rate is None
    assert teaching(method=EMA | {"ema_rate": 1.0}).method.ema_rate == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teach": None, "method": EMA}, "a recovery's target is what the healthy original does"),
        ({"teach": None, "method": EMA, "teacher": {"source": "b"}}, "belongs to teach"),
        ({"method": EMA | {"type": "sft"}}, "belongs to method.type self_demonstration"),
        ({"method": EMA | {"type": "auto"}}, "belongs to method.type self_demonstration"),
        ({"method": {"type": "self_demonstration", "ema_rate": 0.1}}, "belongs to method.teacher ema"),
        ({"method": EMA | {"ema_rate": 0.0}}, "greater than 0"),
        ({"method": EMA | {"ema_rate": 1.1}}, "less than or equal to 1"),
        ({"method": EMA | {"teacher": "live"}}, "'frozen' or 'ema'"),
    ],
)
def test_a_teacher_moves_nowhere_else(changes, words):
    with pytest.raises(ValidationError, match=words):
        teaching(**changes)
