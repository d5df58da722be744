"""The error tree: which status is which error, what it says, and that it survives pickling."""

import pickle

import pytest

import recoup
from recoup.errors import problem_of, status_error
from recoup.schemas import Problem, Recovery

PROBLEM = {
    "type": "about:blank",
    "title": "Unprocessable",
    "status": 422,
    "detail": "The body cannot be accepted.",
    "code": "invalid",
    "request_id": "req_7",
    "errors": [{"pointer": "/seed", "code": "type", "message": "expected an integer"}],
}
RECOVERY = Recovery.model_validate(
    {
        "id": "rec_1",
        "object": "recovery",
        "state": "failed",
        "stage": "distil",
        "outcome": None,
        "error": {"code": "out_of_memory", "message": "Too little memory."},
        "progress": None,
        "request": {"student": {"source": "s"}, "teacher": {"source": "t"}},
        "pausing": False,
        "retry_of": None,
        "epoch": 1,
        "failures": 1,
        "losses": 0,
        "version": 9,
        "created_at": 1.0,
        "started_at": None,
        "finished_at": None,
    }
)


def problem(status: int) -> Problem:
    return Problem.model_validate(PROBLEM | {"status": status})


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, recoup.BadRequestError),
        (401, recoup.AuthenticationError),
        (403, recoup.PermissionDeniedError),
        (404, recoup.NotFoundError),
        (409, recoup.ConflictError),
        (422, recoup.UnprocessableEntityError),
        (429, recoup.RateLimitError),
        (500, recoup.InternalServerError),
        (503, recoup.InternalServerError),
        (418, recoup.APIStatusError),
    ],
)
def test_each_status_has_its_error(status, expected):
    error = status_error(problem(status))
    assert type(error) is expected
    assert (error.status, error.code, error.request_id) == (status, "invalid", "req_7")


def test_a_refusal_names_its_reason_its_request_and_the_fields():
    text = str(status_error(problem(422)))
    assert "422 (invalid): The body cannot be accepted. [request req_7]" in text
    assert "/seed: expected an integer" in text


def test_a_failed_job_says_where_and_why():
    text = str(recoup.JobFailedError(RECOVERY))
    assert text == "Recovery rec_1 failed in stage distil: Too little memory. (out_of_memory)"


@pytest.mark.parametrize(
    "error",
    [
        status_error(problem(422)),
        status_error(problem(503)),
        recoup.JobFailedError(RECOVERY),
        recoup.WaitTimeoutError(RECOVERY),
        recoup.APITimeoutError("It did not answer."),
        recoup.ChecksumError("It is another file."),
        recoup.InvalidArgumentError("It is no id."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_the_status_line_outweighs_the_status_in_the_body():
    assert problem_of(503, problem(422).model_dump_json().encode(), "").status == 503


@pytest.mark.parametrize(("status", "title"), [(502, "Bad Gateway"), (599, "Unknown status")])
def test_a_page_of_some_proxy_becomes_a_problem_too(status, title):
    made = problem_of(status, b"<html>", "req_1")
    assert (made.title, made.code, made.request_id) == (title, f"http_{status}", "req_1")
