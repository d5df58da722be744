"""What must never get in, each with the reply it gets. Nothing here may be a 5xx, or leave a row behind."""

import gzip
import hashlib
import io
import itertools
import json
import re
import socket
import tarfile
import threading
import time
import zlib
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest

from recoup.schemas import Problem
from recoup_api import limit
from recoup_api.app import create_app

JSON = {"content-type": "application/json"}


@pytest.fixture
def post(client, ledger):
    """Posts a body that must be refused; returns the problem."""

    def post(content, headers=JSON):
        answer = client.post("/v1/recoveries", content=content, headers=headers)
        assert answer.headers["content-type"] == "application/problem+json"
        assert ledger.list(None, 10).data == []
        problem = Problem.model_validate(answer.json())
        assert problem.status == answer.status_code
        return problem

    return post


def with_(body, place, raw):
    """The body as JSON with `raw` in a place: a field's name, or two with a dot."""
    outer, _, inner = place.partition(".")
    marked = body | {outer: {inner: "MARK"} if inner else "MARK"}
    return json.dumps(marked).replace('"MARK"', raw).encode()


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 422, "body_required"),
        (b"  \n", 422, "body_required"),
        (b'{"student": {', 400, "malformed_json"),
        (b"{'student': 1}", 400, "malformed_json"),
        (b"[]", 422, "invalid_value"),
        (b"null", 422, "invalid_value"),
        (b"5", 422, "invalid_value"),
        (b"[" * 100_000, 400, "too_deep"),
        (b'{"metadata": ' + b'{"a":' * 20_000, 400, "too_deep"),
        (b'{"a": "' + b'\\"' * 100_000, 400, "malformed_json"),
        (b'{"a": "\xff"}', 400, "malformed_json"),
        (b"\xef\xbb\xbf{}", 415, "unsupported_media_type"),
        ("{}".encode("utf-16"), 415, "unsupported_media_type"),
        ("{}".encode("utf-16-be"), 415, "unsupported_media_type"),
        (b'"\\ud800"', 422, "invalid_value"),
        (b'{"damage": "auto", "damage": "pruning"}', 400, "duplicate_key"),
        (b'{"student": {"source": "a", "source": "b"}}', 400, "duplicate_key"),
        (b'{"metadata": {"k": "' + b"x" * (5 << 20) + b'"}}', 413, "body_too_large"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_body_that_is_none(post, content, status, code):
    began = time.process_time()
    problem = post(content)
    assert (problem.status, problem.code) == (status, code)
    assert time.process_time() - began < 0.5


def test_deep_nesting_is_refused_before_it_is_read(post):
    began = time.process_time()
    post(b"[" * 100_000)
    assert time.process_time() - began < 0.05


def test_malformed_json_is_told_with_its_place(post):
    assert "character 13" in post(b'{"student": {').detail


@pytest.mark.parametrize(
    ("place", "raw", "pointer"),
    [
        ("training.learning_rate", "NaN", "/training/learning_rate"),
        ("training.learning_rate", "Infinity", "/training/learning_rate"),
        ("training.learning_rate", "-Infinity", "/training/learning_rate"),
        ("training.learning_rate", "1e999", "/training/learning_rate"),
        ("seed", "9" * 5000, "/seed"),
        ("method.temperature", "9" * 5000, "/method/temperature"),
        ("seed", str(2**70), "/seed"),
        ("training.steps", '"2"', "/training/steps"),
        ("training.steps", "true", "/training/steps"),
        ("training.steps", "1.0", "/training/steps"),
        ("student.source", '"a\\u0000"', "/student/source"),
        ("metadata.k", '"\\u0000"', "/metadata/k"),
        ("metadata.k", '"\\ud800"', "/metadata/k"),
        ("metadata.k", '"\\udc00\\ud800"', "/metadata/k"),
        ("metadata", '{"\\udfff": "v"}', "/metadata"),
        ("metadata", json.dumps({str(n): "" for n in range(60_000)}), "/metadata"),
        ("evaluation.tasks", json.dumps(["t"] * 100_000), "/evaluation/tasks"),
    ],
    ids=lambda value: value[:24],
)
def test_a_value_that_is_none(post, body, place, raw, pointer):
    problem = post(with_(body, place, raw))
    assert (problem.status, problem.code) == (422, "invalid_value")
    assert problem.errors[0].pointer == pointer


def test_a_whole_surrogate_pair_is_text(client, body):
    content = with_(body, "metadata.k", '"\\ud83d\\ude00"')
    accepted = client.post("/v1/recoveries", content=content, headers=JSON)
    assert accepted.json()["request"]["metadata"] == {"k": "😀"}


@pytest.mark.parametrize(
    "source",
    ["../../etc/passwd", "file:///etc/passwd", "http://169.254.169.254/", "a\n", "a b", "-a", "a\\b", "hf:a"],
)
def test_a_reference_that_names_no_model(post, body, source):
    problem = post(json.dumps(body | {"student": {"source": source}}))
    assert (problem.status, problem.code) == (422, "invalid_model_ref")
    assert problem.errors[0].pointer == "/student/source"


@pytest.mark.parametrize(
    "type",
    [
        "text/plain",
        "",
        "application/json; charset=utf-7",
        "application/json; charset=utf-16",
        "multipart/form-data",
        "application/jsonx",
        "application/json, text/plain",
    ],
)
def test_another_content_type(post, body, type):
    problem = post(json.dumps(body), {"content-type": type})
    assert (problem.status, problem.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_a_packed_body(post, body, encoding):
    problem = post(gzip.compress(json.dumps(body).encode()), JSON | {"content-encoding": encoding})
    assert (problem.status, problem.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("limit=0", 422, "invalid_value"),
        ("limit=-1", 422, "invalid_value"),
        ("limit=1000000000", 422, "invalid_value"),
        ("limit=1e9", 422, "invalid_value"),
        ("limit=abc", 422, "invalid_value"),
        ("limit=" + "9" * 5000, 422, "invalid_value"),
        ("limit=1&limit=2", 422, "invalid_value"),
        ("state=done", 422, "invalid_value"),
        ("foo=1", 422, "unknown_parameter"),
        ("limit%00=1", 422, "unknown_parameter"),
        ("after=%00", 400, "invalid_cursor"),
        ("after=%ff%fe", 400, "invalid_cursor"),
        ("after=rec_000000000000000000000000", 400, "invalid_cursor"),
    ],
)
def test_a_query_that_cannot_be(client, query, status, code):
    refused = client.get(f"/v1/recoveries?{query}")
    assert (refused.status_code, refused.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/recoveries/..%2f..%2fetc%2fpasswd",
        "/v1/recoveries/%00",
        "/v1/recoveries/%ff%fe",
        "/v1/recoveries/rec_%0a",
        "/v1/recoveries/",
        "/v1/files/%00",
        "/v1/files/..%2f",
        "//v1/recoveries",
    ],
)
def test_a_path_that_leads_nowhere(client, path):
    assert client.get(path, follow_redirects=False).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/recoveries", "GET, HEAD, POST"),
        ("OPTIONS", "/v1/recoveries", "GET, HEAD, POST"),
        ("TRACE", "/v1/files", "GET, HEAD, POST"),
        ("HEAD", "/v1/recoveries/rec_1/cancel", "POST"),
        ("DELETE", "/healthz", "GET, HEAD"),
    ],
)
def test_a_method_that_a_path_does_not_have(client, method, path, allow):
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert method == "HEAD" or answer.json()["code"] == "method_not_allowed"


def test_the_head_is_that_of_get_without_its_body(client, job):
    url = f"/v1/recoveries/{job['id']}"
    head, get = client.head(url), client.get(url)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", get.headers["etag"])


# Data sets


@pytest.fixture
def upload(client, settings):
    def upload(content, **fields):
        data = {"purpose": "fine-tune"} | fields
        answer = client.post("/v1/files", files={"file": ("data.jsonl", content)}, data=data)
        if answer.status_code != 200:
            assert list(settings.files_dir.glob("*")) == []
        return answer

    return upload


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "malformed_json"),
        (b'{"prompt": NaN}', "invalid_value"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_key"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "\\u0000"}', "invalid_value"),
        (b'{"prompt": "\xff"}', "malformed_json"),
        (b"[" * 100_000, "too_deep"),
        (b'{"messages": []}', "invalid_value"),
        (b'{"messages": [{"role": "god", "content": "x"}]}', "invalid_value"),
        ('{"prompt": "x"}'.encode("utf-16-le"), "unsupported_media_type"),
        (b"PK\x03\x04", "malformed_json"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_line_that_is_no_row_is_named(upload, line, code):
    refused = upload(b'{"prompt": "good"}\n' * 6 + line + b"\n").json()
    assert (refused["status"], refused["code"]) == (422, "invalid_dataset")
    assert refused["errors"][0]["code"] == code
    assert refused["errors"][0]["pointer"].startswith("/line/7")


def test_a_hundred_findings_are_enough(upload):
    assert len(upload(b"{\n" * 1000).json()["errors"]) == 100


@pytest.mark.parametrize(
    "content", [b'\r\n{"prompt": "a"}\r\n\r\n{"prompt": "b"}', b'{"prompt": "a"}\n{"prompt": "b"}\n']
)
def test_lines_may_end_as_they_like(upload, content):
    assert upload(content).json()["rows"] == 2


def test_a_data_set_may_come_gzipped(upload):
    plain = b"".join(b'{"prompt": "What is %d?"}\n' % n for n in range(100))
    file = upload(gzip.compress(plain)).json()
    assert (file["rows"], file["bytes"]) == (100, len(plain))


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (gzip.compress(b'{"prompt": "x"}\n' * (1 << 21)), 413, "decompressed_too_large"),
        (gzip.compress(gzip.compress(b'{"prompt": "x"}')), 422, "invalid_dataset"),
        (gzip.compress(b'{"prompt": "x"}')[:-4], 400, "malformed_gzip"),
        (gzip.compress(b'{"prompt": "x"}') + b"more", 400, "malformed_gzip"),
        (b"\x1f\x8bnothing", 400, "malformed_gzip"),
    ],
    ids=["bomb", "twice", "cut", "longer", "none"],
)
def test_gzip_that_is_none_or_too_much(upload, content, status, code):
    refused = upload(content)
    assert (refused.status_code, refused.json()["code"]) == (status, code)


def test_a_content_that_is_not_the_declared_one(upload):
    refused = upload(b'{"prompt": "x"}', sha256="0" * 64)
    assert (refused.status_code, refused.json()["code"]) == (400, "checksum_mismatch")


def tar(*members):
    """A tar file of (name, link or None)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, link in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            archive.addfile(entry, io.BytesIO())
    return content.getvalue()


ARCHIVES = tar(("../../evil", None)), tar(("data.jsonl", "/etc/passwd")), gzip.compress(tar(("a", None)))


@pytest.mark.parametrize("content", ARCHIVES, ids=["outside", "link", "packed"])
def test_an_archive_is_no_data_set(upload, content):
    refused = upload(content)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_dataset")


def test_an_upload_that_goes_on_with_other_bytes(client, upload):
    first, other = b'{"prompt": "a"}\n{"prompt": "b"}\n', b'{"prompt": "a"}\n{"prompt": "c"}\n'
    sha256 = hashlib.sha256(first).hexdigest()
    half = upload(first[:20], sha256=sha256)
    assert (half.status_code, half.json()["code"]) == (400, "checksum_mismatch")
    refused = upload(other, sha256=sha256)
    assert (refused.status_code, refused.json()["code"]) == (400, "checksum_mismatch")
    keyed = {"data": {"purpose": "fine-tune"}, "headers": {"idempotency-key": "one"}}
    assert client.post("/v1/files", files={"file": ("a.jsonl", first)}, **keyed).status_code == 200
    again = client.post("/v1/files", files={"file": ("a.jsonl", other)}, **keyed)
    assert (again.status_code, again.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("fields", [{"purpose": ""}, {"purpose": "A B"}, {"sha256": "x"}])
def test_a_field_of_the_form_that_cannot_be(upload, fields):
    assert upload(b'{"prompt": "x"}', **fields).status_code == 422


@pytest.mark.parametrize("content", [b"", b"--x", b"no form at all"])
@pytest.mark.parametrize("type", ["multipart/form-data", "multipart/form-data; boundary=x", "text/plain", ""])
def test_a_form_that_is_none(client, content, type):
    assert client.post("/v1/files", content=content, headers={"content-type": type}).status_code in {400, 422}


def test_many_ranges_of_a_file(client, finished):
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(10_000))[:20_000]
    answer = client.get(f"/v1/recoveries/{finished}/artifacts/report.html", headers={"range": ranges})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")


# On the wire


@pytest.fixture
def url(serve, settings, ledger):
    return serve(create_app(settings, ledger))


@pytest.fixture
def raw(url):
    """Sends bytes, and tells the status and the text of the answer."""

    def send(request):
        port = urlsplit(url).port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
            wire.sendall(request.replace(b"HOST", f"127.0.0.1:{port}".encode()))
            answer = b"".join(iter(lambda: wire.recv(65536), b""))
        return int(answer.split()[1]), answer.decode()

    return send


GET = b"GET /healthz HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n"
POST = GET.replace(b"GET /healthz", b"POST /v1/recoveries") + b"Content-Type: application/json\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: abc\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Bad Header\r\n\r\n",
    ],
)
def test_a_request_that_two_servers_could_read_differently(raw, rest):
    assert raw(POST + rest)[0] in {400, 501}


def test_headers_that_are_too_large(raw):
    status, text = raw(GET + b"X-Long: " + b"x" * 40_000 + b"\r\n\r\n")
    assert (status, "headers_too_large" in text) == (431, True)


def test_headers_that_are_far_too_large(raw):
    assert raw(GET + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n")[0] == 431


def test_a_body_that_never_comes(raw, monkeypatch):
    monkeypatch.setattr(limit, "PATIENCE_SECONDS", 0.3)
    status, text = raw(POST + b"Content-Length: 100\r\n\r\n{")
    assert (status, "request_timeout" in text) == (408, True)


def bomb():
    """Half a gigabyte of blank lines."""
    packer = zlib.compressobj(9, wbits=31)
    for _ in range(512):
        yield packer.compress((b" " * 65_535 + b"\n") * 16)
    yield packer.flush()


@pytest.mark.parametrize(
    ("pieces", "code"),
    [((b"x" * (1 << 16) for _ in range(800)), "line_too_long"), (bomb(), "decompressed_too_large")],
    ids=["line of fifty megabytes", "bomb"],
)
def test_memory_stays_flat(url, pieces, code):
    def form():
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield from pieces
        yield b"\r\n--x--\r\n"

    process, peak, over = psutil.Process(), [], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not over.wait(0.01):
            peak.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx2.post(f"{url}/v1/files", content=form(), headers=headers, timeout=120)
    over.set()
    watching.join()
    assert answer.json()["code"] == code
    assert max(peak) - before < 64 << 20


HOSTILE = [b"", b"\x00", b"{}", b"[]", b'{"a":' * 100, b"\xff" * 10, b"null", b"1" * 5000, b'{"\\ud800": 1}']


@pytest.mark.parametrize(
    "headers",
    [
        JSON,
        {"content-type": "multipart/form-data; boundary=x"},
        {"range": "bytes=9-1"},
        {"accept": "text/html"},
    ],
    ids=lambda headers: next(iter(headers.values())),
)
def test_nothing_of_it_is_a_fault_of_the_servers(client, headers):
    for path, methods in client.app.openapi()["paths"].items():
        place = re.sub(r"\{\w+\}", "%00%ff", path)
        for method, content in itertools.product(methods, HOSTILE):
            answer = client.request(method, place, content=content, headers=headers)
            assert answer.status_code < 500, (method, place, content)
