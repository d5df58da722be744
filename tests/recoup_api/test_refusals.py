"""What is refused at the door: each with its own status and code, and before any row is written."""

import json

import pytest

from recoup.schemas import Problem


@pytest.fixture
def refusal(client, ledger):
    """The problem that a body gets; nothing of it may be left."""

    def post(body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | headers
        answer = client.post("/v1/recoveries", content=content, headers=sent)
        assert answer.headers["content-type"] == "application/problem+json"
        assert ledger.list(None, 10).data == []
        problem = Problem.model_validate(answer.json())
        assert problem.status == answer.status_code
        return problem

    return post


def found(problem):
    return [(item.pointer, item.code) for item in problem.errors]


def test_an_unknown_field(refusal, body):
    problem = refusal(body | {"foo": 1})
    assert (problem.status, problem.code) == (422, "unknown_field")
    assert found(problem) == [("/foo", "unknown_field")]


@pytest.mark.parametrize("name", ["nowhere", "a" * 500])
def test_a_missing_model(refusal, body, name):
    problem = refusal(body | {"student": {"source": name}})
    assert (problem.status, problem.code) == (422, "model_not_found")
    assert found(problem) == [("/student/source", "model_not_found")]


def test_a_model_whose_weights_may_carry_code(refusal, body, write_model):
    folder = write_model("pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    problem = refusal(body | {"student": {"source": "pickled"}})
    assert (problem.status, problem.code) == (422, "unsafe_weights_format")
    assert "pytorch_model.bin" in problem.detail


def test_a_model_that_brings_code_along(refusal, body, write_model):
    write_model("coded", auto_map={"AutoModel": "modeling.Evil"})
    problem = refusal(body | {"teacher": {"source": "coded"}})
    assert (problem.status, problem.code) == (422, "remote_code_refused")
    assert found(problem) == [("/teacher/source", "remote_code_refused")]


def test_a_student_with_another_vocabulary(refusal, body, write_model):
    write_model("foreign", tokens="abcd")
    problem = refusal(body | {"student": {"source": "foreign"}, "method": {"type": "off_policy"}})
    assert (problem.status, problem.code) == (422, "vocabulary_mismatch")
    assert "4 tokens" in problem.detail
    assert "3 tokens" in problem.detail


def test_prompts_that_were_never_uploaded(refusal, body):
    problem = refusal(body | {"prompts": {"file": "file-" + "0" * 24}})
    assert found(problem) == [("/prompts/file", "file_not_found")]
    assert (problem.status, problem.code) == (422, "file_not_found")


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"seed": 2**70}, "/seed"),
        ({"seed": -1}, "/seed"),
        ({"seed": True}, "/seed"),
        ({"seed": 1.0}, "/seed"),
        ({"student": {}}, "/student/source"),
        ({"teacher": None}, "/teacher"),
        ({"training": {"steps": "2"}}, "/training/steps"),
        ({"method": {"type": "self_demonstration", "teacher": "live"}}, "/method/teacher"),
        ({"method": {"type": "self_demonstration", "ema_rate": 0.0}}, "/method/ema_rate"),
        ({"training": {"learning_rate": 0}}, "/training/learning_rate"),
        ({"training": {"lora": {"targets": ["A B"]}}}, "/training/lora/targets/0"),
        ({"damage": "rust"}, "/damage"),
        ({"alignment": {"every_steps": 0}}, "/alignment/every_steps"),
        ({"alignment": {"weight": -0.1}}, "/alignment/weight"),
        ({"alignment": {"layers": []}}, "/alignment/layers"),
        ({"prompts": 5}, "/prompts"),
        ({"prompts": {}}, "/prompts/file"),
        ({"prompts": {"file": "../x"}}, "/prompts/file"),
        ({"prompts": {"builtin": "other"}}, "/prompts/builtin"),
        ({"prompts": {"compose": 79}}, "/prompts/compose"),
        ({"prompts": {"compose": 80, "temperature": 0.0}}, "/prompts/temperature"),
        ({"metadata": {"k": 5}}, "/metadata/k"),
        ({"metadata": {"a/b~c": 5}}, "/metadata/a~1b~0c"),
        ({"metadata": {"k": "\x00"}}, "/metadata/k"),
    ],
)
def test_a_value_out_of_bounds_is_named_by_its_place_in_what_was_sent(refusal, body, change, pointer):
    problem = refusal(body | change)
    assert (problem.status, problem.code) == (422, "invalid_value")
    assert found(problem) == [(pointer, "invalid_value")]


def test_a_recovery_by_a_teacher_that_moves(refusal, body):
    problem = refusal(body | {"method": {"type": "self_demonstration", "teacher": "ema"}})
    assert (problem.status, problem.code) == (422, "invalid_value")
    assert "a recovery's target is what the healthy original does" in problem.detail


def test_a_block_that_the_student_does_not_have(refusal, body, write_model):
    write_model("four", num_hidden_layers=4)
    problem = refusal(body | {"student": {"source": "four"}, "alignment": {"weight": 0.1, "layers": [0, 4]}})
    assert (problem.status, problem.code) == (422, "unsupported_request")
    assert found(problem) == [("/alignment/layers", "unsupported_request")]


def test_an_unknown_field_deep_inside_is_named_by_its_place(refusal, body):
    problem = refusal(body | {"prompts": {"builtin": "general", "extra": 1}})
    assert found(problem) == [("/prompts/extra", "unknown_field")]


@pytest.mark.parametrize("type", ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])
def test_json_in_utf8_may_say_so(client, body, type):
    answer = client.post("/v1/recoveries", content=json.dumps(body), headers={"content-type": type})
    assert answer.status_code == 202


def test_a_body_that_is_too_large_is_refused_though_it_hides_its_size(client):
    pieces = (b"x" * (1 << 18) for _ in range(8))
    answer = client.post("/v1/recoveries", content=pieces, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_what_was_sent_is_never_echoed(refusal, body):
    secret = "hunter2-hunter2"
    for change in ({"student": {"source": f"{secret} "}}, {"seed": secret}, {"metadata": {"k": [secret]}}):
        assert secret not in refusal(body | change).model_dump_json()
