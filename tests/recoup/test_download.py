"""Downloads: complete and verified, or not there."""

import hashlib
import threading
from pathlib import Path

import pytest

import recoup


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


def test_a_file_without_end_is_cut_off(client, service, job, tmp_path):
    service.sent_instead["report.json"] = b"x" * 50_000_000
    with pytest.raises(recoup.ChecksumError):
        client.recoveries.download(job.id, tmp_path)
    assert [*content(tmp_path)] == ["adapter/weights.safetensors"]


def test_a_file_that_is_already_right_is_not_fetched_again(client, service, job, tmp_path):
    client.recoveries.download(job.id, tmp_path)
    (tmp_path / "report.json").write_bytes(b"[]")
    service.seen.clear()
    client.recoveries.download(job.id, tmp_path)
    fetched = [request.path for request in service.seen if "/artifacts/" in request.path]
    assert fetched == [f"/v1/recoveries/{job.id}/artifacts/report.json"]
    assert content(tmp_path) == service.artifacts


def ranges(service) -> list[str | None]:
    """What was asked of the first artifact."""
    fetched = [request for request in service.seen if request.path.endswith("/weights.safetensors")]
    return [request.headers.get("Range") for request in fetched]


def test_a_download_that_broke_off_is_resumed_where_it_broke(client, service, job, tmp_path, faults):
    service.faults += [None, faults(cut=100), faults(502, {"Retry-After": "0"}), faults(cut=1000)]
    client.recoveries.download(job.id, tmp_path)
    assert ranges(service) == [None, "bytes=100-", "bytes=100-", "bytes=1100-"]
    assert content(tmp_path) == service.artifacts


def test_a_download_survives_a_restart_of_the_server(client, service, job, tmp_path, faults):
    service.faults += [None, faults(cut=100)]
    stopping = threading.Timer(0.1, service.stop)
    starting = threading.Timer(1.0, service.start)
    stopping.start(), starting.start()
    client.recoveries.download(job.id, tmp_path)
    stopping.join(), starting.join()
    assert content(tmp_path) == service.artifacts


def leave_a_part(client, service, job, folder, part: bytes) -> None:
    (artifact, _) = client.recoveries.artifacts(job.id)
    (folder / "adapter").mkdir()
    (folder / "adapter" / f".weights.safetensors.{artifact.sha256[:12]}.part").write_bytes(part)
    service.seen.clear()


def test_the_next_download_takes_up_the_part_that_the_last_one_left(client, service, job, tmp_path):
    leave_a_part(client, service, job, tmp_path, b"w" * 40_000)
    client.recoveries.download(job.id, tmp_path)
    assert ranges(service) == ["bytes=40000-"]
    assert content(tmp_path) == service.artifacts


def test_a_part_that_was_spoiled_is_thrown_away(client, service, job, tmp_path):
    leave_a_part(client, service, job, tmp_path, b"v" * 40_000)
    client.recoveries.download(job.id, tmp_path)
    assert ranges(service) == ["bytes=40000-", None]
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
