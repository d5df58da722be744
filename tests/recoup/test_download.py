"""Downloads: complete and verified, or not there."""

import hashlib
from itertools import repeat
from pathlib import Path

import pytest

import recoup
from recoup import _download


@pytest.fixture
def job(client):
    return client.recoveries.create(student="damaged", teacher="healthy")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_download_is_the_manifest_byte_for_byte(client, service, job, tmp_path):
    paths = client.recoveries.download(job.id, tmp_path / "out")
    assert content(tmp_path / "out") == service.artifacts
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == [*service.artifacts]
    for artifact in client.recoveries.artifacts(job.id):
        found = hashlib.sha256((tmp_path / "out" / artifact.path).read_bytes()).hexdigest()
        assert found == artifact.sha256


@pytest.mark.parametrize("wrong", [b"v" * 70_000, b"w" * 69_999, b"w" * 70_001, b""])
def test_wrong_bytes_are_not_kept(client, service, job, tmp_path, wrong):
    service.sent_instead["adapter/weights.safetensors"] = wrong
    with pytest.raises(recoup.ChecksumError, match=r"adapter/weights\.safetensors"):
        client.recoveries.download(job.id, tmp_path)
    assert content(tmp_path) == {}


def test_a_file_without_end_is_cut_off(client, job, tmp_path):
    (_, report) = client.recoveries.artifacts(job.id)
    with pytest.raises(recoup.ChecksumError):
        _download.save(repeat(b"x" * 1000), tmp_path / "report.json", report)
    assert content(tmp_path) == {}


def test_a_file_that_is_already_right_is_not_fetched_again(client, service, job, tmp_path):
    client.recoveries.download(job.id, tmp_path)
    (tmp_path / "report.json").write_bytes(b"[]")
    service.seen.clear()
    client.recoveries.download(job.id, tmp_path)
    fetched = [request.path for request in service.seen if "/artifacts/" in request.path]
    assert fetched == [f"/v1/recoveries/{job.id}/artifacts/report.json"]
    assert content(tmp_path) == service.artifacts


def test_a_connection_that_drops_does_not_spoil_a_download(client, service, job, tmp_path, faults):
    client.recoveries.artifacts(job.id)
    cut = faults(200, {"Content-Length": "70000", "Connection": "close"}, body=b"w" * 100)
    service.faults += [None, cut]
    client.recoveries.download(job.id, tmp_path)
    assert content(tmp_path) == service.artifacts


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/x", "..", "a/..", "", ".", "a\\..\\x", "C:x", "a\0b"]
)
def test_a_path_that_leaves_the_folder_is_refused_before_anything_is_written(
    client, service, job, tmp_path, path
):
    service.artifacts[path] = b"evil"
    with pytest.raises(recoup.UnsafePathError, match="would leave"):
        client.recoveries.download(job.id, tmp_path / "out")
    assert content(tmp_path) == {}


def test_a_link_that_points_out_of_the_folder_is_not_followed(client, job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(recoup.UnsafePathError):
        client.recoveries.download(job.id, tmp_path / "out")
    assert content(tmp_path / "elsewhere") == {}
