"""The calls as values: what goes into a path, a query and a body."""

import pytest

from recoup import CreateRecovery, InvalidArgumentError, _calls
from recoup._calls import DIAGNOSES, RECOVERIES


@pytest.mark.parametrize("id", ["", "..", "a/b", "a?b", "a\n", "%2e", "-a", "a b", "é", "a" * 129])
def test_an_id_that_could_address_another_route_is_refused(id):
    with pytest.raises(InvalidArgumentError, match="is no id of a"):
        RECOVERIES.get(id)
    with pytest.raises(ValueError):
        _calls.get_file(id)


@pytest.mark.parametrize(
    ("path", "escaped"),
    [("a/b.json", "a/b.json"), ("a b?c#d", "a%20b%3Fc%23d"), ("100%/é", "100%25/%C3%A9")],
)
def test_an_artifacts_path_is_escaped_segment_by_segment(path, escaped):
    assert _calls.get_artifact("rec_1", path).path == f"/v1/recoveries/rec_1/artifacts/{escaped}"


def test_only_what_the_caller_set_is_sent():
    request = CreateRecovery.model_validate(
        {"student": {"source": "s"}, "teacher": {"source": "t"}, "training": {"steps": 5}}
    )
    body = {"student": {"source": "s"}, "teacher": {"source": "t"}, "training": {"steps": 5}}
    assert _calls.create_recovery(request).json == body


def test_what_was_not_given_is_not_in_the_query():
    assert RECOVERIES.list(None, None).query == ()
    assert RECOVERIES.list("c", 5).query == (("after", "c"), ("limit", "5"))


@pytest.mark.parametrize("key", ["", "a b", "a\r\nX-Evil: 1", "schlüssel", "k" * 256])
def test_an_idempotency_key_cannot_smuggle_a_header(key):
    with pytest.raises(InvalidArgumentError, match="idempotency key"):
        _calls.create_recovery(student="s", teacher="t", idempotency_key=key)
    with pytest.raises(InvalidArgumentError, match="idempotency key"):
        RECOVERIES.retry("rec_1", idempotency_key=key)


@pytest.mark.parametrize("call", [_calls.create_recovery, _calls.dry_run])
def test_a_model_that_is_taught_is_its_own_teacher(call):
    file = "file-" + "0" * 24
    body = call(student="healthy", teach={"file": file}).json
    assert body == {
        "student": {"source": "healthy"},
        "teacher": {"source": "healthy"},
        "teach": {"file": file},
    }


def test_whatever_creates_takes_an_idempotency_key(tmp_path):
    models = {"student": "s", "teacher": "t", "idempotency_key": "k"}
    calls = [_calls.create_recovery(**models), _calls.create_diagnosis(**models)]
    calls += [
        _calls.create_file(tmp_path / "a", idempotency_key="k"),
        RECOVERIES.retry("rec_1", idempotency_key="k"),
    ]
    assert [call.key for call in calls] == ["k"] * 4


def test_only_what_shall_change_is_sent():
    call = RECOVERIES.change("rec_1", priority=3)
    assert (call.method, call.path, call.json) == ("PATCH", "/v1/recoveries/rec_1", {"priority": 3})


@pytest.mark.parametrize("verb", ["pause", "resume", "retry", "cancel"])
def test_a_verb_is_a_post_below_the_job(verb):
    call, other = getattr(RECOVERIES, verb)("rec_1"), getattr(DIAGNOSES, verb)("dia_1")
    assert (call.method, call.path) == ("POST", f"/v1/recoveries/rec_1/{verb}")
    assert (other.method, other.path) == ("POST", f"/v1/diagnoses/dia_1/{verb}")


def test_pairs_of_metadata_are_parameters_of_their_own():
    query = RECOVERIES.list(outcome="partial", damage="pruning", metadata={"a b": "1", "team": "x&y"}).query
    pairs = (("metadata[a b]", "1"), ("metadata[team]", "x&y"))
    assert query == (("outcome", "partial"), ("damage", "pruning"), *pairs)
