"""Published files over HTTP, from either store."""

import io

import httpx2
import pytest

from recoup_api.app import create_app
from recoup_jobs.artifacts import content_name, open_published
from recoup_jobs.stores import open_store

pytestmark = pytest.mark.parametrize("artifact_store", ["folder", "bucket"], indirect=True)

TEXT = "0123456789"
LARGE = TEXT * (2 << 20)
"""20 MiB: more than one part of either store."""


@pytest.fixture
def url(finish):
    return f"/v1/recoveries/{finish({'a.txt': TEXT, 'empty.txt': '', 'large.txt': LARGE})}/artifacts"


def test_a_file_comes_whole_with_its_hash_as_tag(client, url):
    answer = client.get(f"{url}/large.txt")
    assert (answer.status_code, answer.text == LARGE) == (200, True)
    (listed,) = [file for file in client.get(url).json()["data"] if file["path"] == "large.txt"]
    assert answer.headers["etag"] == f'"{listed["sha256"]}"'
    assert answer.headers["content-length"] == str(len(LARGE))
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-", 0, 9), ("2-4", 2, 4), ("7-", 7, 9), ("-3", 7, 9), ("-99", 0, 9), ("9-999", 9, 9)],
)
def test_a_range_comes_alone(client, url, asked, first, last):
    answer = client.get(f"{url}/a.txt", headers={"range": f"bytes={asked}"})
    assert (answer.status_code, answer.text) == (206, TEXT[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/10"


def test_a_range_across_parts_is_a_slice(client, url):
    span = (8 << 20) - 3, (8 << 20) + 5
    answer = client.get(f"{url}/large.txt", headers={"range": f"bytes={span[0]}-{span[1]}"})
    assert (answer.status_code, answer.text) == (206, LARGE[span[0] : span[1] + 1])


@pytest.mark.parametrize("asked", ["bytes=-", "bytes=4-2", "bytes=x-y", "lines=1-2", "bytes", ""])
def test_a_range_that_cannot_be_read_is_none(client, url, asked):
    answer = client.get(f"{url}/a.txt", headers={"range": asked})
    assert (answer.status_code, answer.text) == (200, TEXT)


@pytest.mark.parametrize(("file", "asked"), [("a.txt", "10-"), ("a.txt", "-0"), ("empty.txt", "0-")])
def test_a_range_beyond_the_end_cannot_be_satisfied(client, url, file, asked):
    answer = client.get(f"{url}/{file}", headers={"range": f"bytes={asked}"})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")


def test_a_file_without_bytes_comes_as_that(client, url):
    answer = client.get(f"{url}/empty.txt")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(("tag", "status"), [(None, 206), ('"another"', 200)])
def test_the_rest_of_another_content_is_not_the_rest_of_this_one(client, url, tag, status):
    tag = tag or client.get(f"{url}/a.txt").headers["etag"]
    answer = client.get(f"{url}/a.txt", headers={"range": "bytes=5-", "if-range": tag})
    assert answer.status_code == status


@pytest.fixture
def spoil(settings, url):
    """Spoils what lies in the store below a published path."""
    place = f"{url.split('/')[3]}/e1/package"

    def change(path, content):
        store = open_store(settings)
        published = open_published(store, place)
        (artifact,) = [artifact for artifact in published.artifacts if artifact.path == path]
        name = content_name(published.job_id, artifact)
        store.remove([name]) if content is None else store.put(name, io.BytesIO(content))

    return change


@pytest.mark.parametrize("left", [None, b"0123456780", b"012"])
def test_a_file_that_the_store_lost_or_changed_is_an_error_and_not_an_answer(client, url, spoil, left):
    spoil("a.txt", left)
    answer = client.get(f"{url}/a.txt")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_corrupt")


def test_a_large_file_that_changed_never_arrives_whole(url, spoil, serve, settings, ledger):
    spoil("large.txt", LARGE[:-1].encode() + b"x")
    with (
        pytest.raises(httpx2.RemoteProtocolError, match=r"incomplete|closed"),
        httpx2.stream("GET", serve(create_app(settings, ledger)) + f"{url}/large.txt") as answer,
    ):
        assert answer.status_code == 200
        answer.read()
