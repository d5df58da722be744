import json
import logging

import pytest
import structlog

from recoup_jobs import logs


@pytest.fixture
def configured(capsys):
    """`configured(format)` sends what this process logs to where the lines can be read."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level

    def configure(format):
        logs.configure(format)

        def lines():
            return capsys.readouterr().err.splitlines()

        return lines

    yield configure
    root.handlers[:], root.level = handlers, level
    structlog.contextvars.clear_contextvars()


def test_a_line_of_any_library_is_json_with_the_bound_ids(configured):
    lines = configured("json")
    with structlog.contextvars.bound_contextvars(job_id="rec_1", epoch=3, trace_id="ab"):
        logging.getLogger("celery.worker").warning("lost %s", "touch", extra={"queue": "gpu.cpu"})
    (line,) = map(json.loads, lines())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "lost touch",
        "logger": "celery.worker",
        "level": "warning",
        "job_id": "rec_1",
        "epoch": 3,
        "trace_id": "ab",
        "queue": "gpu.cpu",
    }


def test_ids_are_forgotten_when_their_work_ends(configured):
    lines = configured("json")
    with structlog.contextvars.bound_contextvars(job_id="rec_1"):
        pass
    logging.getLogger("x").info("idle")
    assert "job_id" not in json.loads(lines()[0])


def test_an_exception_stays_on_one_line(configured):
    lines = configured("json")
    try:
        raise ValueError("no such layer")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = lines()
    assert "no such layer" in json.loads(line)["exception"]


def test_text_is_one_line_an_event_too(configured):
    lines = configured("text")
    logging.getLogger("uvicorn.access").info('"GET / HTTP/1.1" 200', extra={"color_message": "red"})
    (line,) = lines()
    assert "level=info" in line and "red" not in line


def test_a_line_break_in_what_is_logged_forges_no_second_line(configured):
    for format in ("json", "text"):
        lines = configured(format)
        logging.getLogger("x").info("asked for %s", "a\nlevel=error event=forged")
        assert len(lines()) == 1
