"""Webhooks on SQLite and PostgreSQL: what is sent, to whom, how often, and that others can verify it."""

import http.client
import json
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest
import standardwebhooks
from sqlalchemy import update

from recoup.schemas.webhook import CreateWebhook
from recoup_jobs import public_https, webhooks
from recoup_jobs.deliveries import BACKOFF_SECONDS, deliver, https_sender
from recoup_jobs.errors import Unprocessable
from recoup_jobs.public_https import Blocked
from recoup_jobs.tables import deliveries

SECRET = b"of this installation"
both = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def receiver():
    """Keeps what was sent, and answers what it is told to."""

    class Receiver:
        answer, got = 200, []

        def __call__(self, url, body, headers):
            self.got.append((url, body, headers))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    receiver = Receiver()
    receiver.got = []
    return receiver


@pytest.fixture
def hook(ledger):
    def add(tenant="default", **asked):
        asked = CreateWebhook(url="https://hooks.example/in", **asked)
        return webhooks.add(ledger, asked, tenant, SECRET, lambda _: ["93.184.216.34"])

    return add


@pytest.fixture
def end(ledger, asked):
    def end():
        job = ledger.create(asked, "gpu.cpu")
        ledger.succeed(ledger.claim("worker", ["gpu.cpu"], 30), "recovered")
        return job.id

    return end


def make_due(ledger):
    with ledger.engine.begin() as conn:
        conn.execute(update(deliveries).where(deliveries.c.next_at.is_not(None)).values(next_at=0.0))


@both
def test_a_recovery_that_ended_is_told_once_and_others_can_verify_it(ledger, hook, end, receiver):
    made, id = hook(), end()
    assert (deliver(ledger, SECRET, receiver), deliver(ledger, SECRET, receiver)) == (1, 0)
    [(url, body, headers)] = receiver.got
    assert url == "https://hooks.example/in"
    event = standardwebhooks.Webhook(made.secret).verify(body, headers)
    assert (event["type"], event["data"]["id"], event["data"]["outcome"]) == (
        "recovery.succeeded",
        id,
        "recovered",
    )
    openai.OpenAI(api_key="x").webhooks.verify_signature(body, headers, secret=made.secret)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(made.secret).verify(body + b" ", headers)


@both
@pytest.mark.parametrize(
    "answer", [500, 302, 404, Blocked("private"), OSError(), http.client.BadStatusLine("x")]
)
def test_what_failed_is_tried_again_under_the_same_id_until_enough(ledger, hook, end, receiver, answer):
    hook(), end()
    receiver.answer = answer
    for _ in range(len(BACKOFF_SECONDS) + 1):
        assert deliver(ledger, SECRET, receiver) == 1
        assert deliver(ledger, SECRET, receiver) == 0
        make_due(ledger)
    assert deliver(ledger, SECRET, receiver) == 0
    assert len({headers["webhook-id"] for _, _, headers in receiver.got}) == 1


def test_a_receiver_that_is_gone_is_told_nothing_more(ledger, hook, end, receiver):
    made = hook()
    receiver.answer = 410
    end()
    deliver(ledger, SECRET, receiver)
    end()
    assert deliver(ledger, SECRET, receiver) == 0
    assert webhooks.get(ledger, made.id, "default").disabled_at is not None


def test_only_what_was_asked_for_is_sent_and_only_to_its_tenant(ledger, hook, end, receiver):
    hook(events=["recovery.failed"]), hook(tenant="other")
    end()
    deliver(ledger, SECRET, receiver)
    assert receiver.got == []


def test_what_ended_before_is_not_told(ledger, hook, end, receiver):
    end()
    hook()
    assert deliver(ledger, SECRET, receiver) == 0


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://10.0.0.1/",
        "https://100.64.0.1/",
        "https://169.254.169.254/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[2002:a00:1::]/",
        "https://[fd00::1]/",
        "https://224.0.0.1/",
        "https://localhost/",
        "https://93.184.216.34:8443/",
        "https://user@93.184.216.34/",
        "https://nowhere.invalid/",
        "https://93.184.216.34:99999/",
    ],
)
def test_a_url_that_leads_to_no_public_host_is_refused(ledger, url):
    with pytest.raises(Unprocessable) as refused:
        webhooks.add(ledger, CreateWebhook(url=url), "default", SECRET, public_https.addresses_of)
    assert refused.value.code == "invalid_webhook_url"


def test_a_name_that_resolves_to_a_private_address_later_is_blocked():
    with pytest.raises(Blocked):
        https_sender(lambda _: ["93.184.216.34", "10.0.0.1"])("https://hooks.example/", b"", {})


@pytest.fixture
def https(tmp_path):
    """An https server that redirects; yields its port, its certificate and what it got."""
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=hooks.example",
    ]
    made += ["-addext", "subjectAltName=DNS:hooks.example", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(
                (self.path, self.headers["Host"], self.rfile.read(int(self.headers["Content-Length"])))
            )
            self.send_response(302)
            self.send_header("Location", "https://127.0.0.1/secret")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1], tmp_path / "cert.pem", got
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_connection_goes_to_the_address_that_was_checked_and_follows_nothing(https):
    port, certificate, got = https
    tls = ssl.create_default_context(cafile=str(certificate))
    body = json.dumps({"a": 1}).encode()
    assert public_https.post("https://hooks.example/in?x=1", body, {}, "127.0.0.1", tls, port) == 302
    assert got == [("/in?x=1", "hooks.example", body)]
    with pytest.raises(ssl.SSLCertVerificationError):
        public_https.post("https://other.example/", body, {}, "127.0.0.1", tls, port)
