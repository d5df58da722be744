"""What looks like a secret is taken out, and what does not stays as it was."""

import io
import logging
import sys

import pytest

from recoup_jobs.scrubber import GONE, places_of_secrets, scrub, scrub_logs, scrub_prints, scrubbed

SECRETS = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "sk-proj-AbCdEfGhIjKlMnOpQr_-12",
    "recoup_0123456789ab_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789_-AbCde",
    "whsec_c2hvd24gb25jZSBhbmQgbmV2ZXI=",
    "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
]


@pytest.fixture
def logged():
    """What a logger of any library writes, once logs are scrubbed."""
    before, text = logging.getLogRecordFactory(), io.StringIO()
    handler, log = logging.StreamHandler(text), logging.getLogger("some.library")
    log.addHandler(handler)
    scrub_logs()
    yield lambda level, *args, **kwargs: (log.log(level, *args, **kwargs), text.getvalue())[1]
    logging.setLogRecordFactory(before)
    log.removeHandler(handler)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_taken_out_wherever_it_stands(secret):
    for text in (secret, f"key={secret}, more", f'{{"a": "{secret}"}}', f"({secret})", f"x {secret}\ny"):
        assert secret not in scrub(text) and GONE in scrub(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abcdefgh12345678", f"Authorization: Bearer {GONE}"),
        ("authorization: bearer abc.def-ghi_jkl==", f"authorization: bearer {GONE}"),
        ("postgresql://me:pa55@host/db", f"postgresql://me:{GONE}@host/db"),
        ("redis://:pa55@127.0.0.1:6379/0", f"redis://:{GONE}@127.0.0.1:6379/0"),
        ("two ab://b:c@d, ef://f:g@h", f"two ab://b:{GONE}@d, ef://f:{GONE}@h"),
    ],
)
def test_what_introduces_a_secret_stays(text, clean):
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://example.com:443/a@b",
        "a bearer of news",
        "hf_short",
        "task-sk-1",
        "rec_0123456789abcdef01234567",
        "http://127.0.0.1:8321/v1/recoveries",
        "ratio 3:4 @ noon",
    ],
)
def test_what_is_no_secret_stays(text):
    assert scrub(text) == text


def test_long_texts_take_no_long_time():
    for text in ("a://" + ":" * 200_000, "bearer " * 50_000, "sk-" * 100_000, "://" * 100_000):
        scrub(text)


def test_json_is_scrubbed_through_and_through():
    value = {"a": [{"b": SECRETS[0]}, 7, None], "c": "x"}
    assert scrubbed(value) == {"a": [{"b": GONE}, 7, None], "c": "x"}
    assert list(places_of_secrets(value)) == [("a", 0, "b")]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_log_of_any_library_has_one(logged, secret):
    assert secret not in logged(logging.WARNING, secret)
    assert secret not in logged(logging.WARNING, "it was %s and %d", secret, 7)
    assert secret not in logged(logging.WARNING, "%(key)s", {"key": secret})
    assert secret not in logged(logging.WARNING, ValueError(secret))
    try:
        raise ValueError(f"no key {secret}")
    except ValueError:
        text = logged(logging.ERROR, "failed", exc_info=True)
    assert secret not in text and "ValueError: no key [secret]" in text


def test_numbers_stay_numbers_in_a_log(logged):
    assert "7 0.50" in logged(logging.WARNING, "%d %.2f", 7, 0.5)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("secret", SECRETS)
def test_what_a_library_prints_holds_no_secret(monkeypatch, stream, secret):
    printed = io.StringIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, printed)
    scrub_prints()
    print("the token is", secret, file=getattr(sys, stream), flush=True)
    getattr(sys, stream).writelines(["one\n", f"{secret}\n"])
    assert printed.getvalue() == f"the token is {GONE}\none\n{GONE}\n"
