import hashlib
import json

import pytest

from recoup.schemas import BuiltinPrompts, FilePrompts
from recoup_jobs import catalog, rows
from recoup_jobs.datasets import Upload, delete_file, load_prompts, load_text, store_file
from recoup_jobs.errors import Conflict, NotFound, TooLarge, Unprocessable

CHAT = b'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}'
PROMPT = b'{"prompt": "Why?", "kind": "explain"}'
TEXT = b'{"text": "It rained."}'


@pytest.fixture
def store(ledger, settings):
    def store(*chunks):
        return store_file(ledger, settings, Upload("data.jsonl", "fine-tune"), chunks)

    return store


@pytest.fixture
def refusal(store, settings):
    """What is said of a data set that is refused, once it is sure that nothing was kept."""

    def refuse(*chunks, error=Unprocessable):
        with pytest.raises(error) as refused:
            store(*chunks)
        assert list(settings.files_dir.iterdir()) == []
        return refused.value

    return refuse


def test_a_file_is_kept_with_its_rows_counted_and_hashed(ledger, store):
    content = CHAT + b"\n" + PROMPT + b"\n"
    file = store(content)
    assert (file.rows, file.bytes, file.filename) == (2, len(content), "data.jsonl")
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert catalog.get(ledger, file.id, "default") == file


def test_prompts_come_back_with_their_answers_and_kinds(ledger, settings, store):
    file = store(CHAT + b"\n" + PROMPT)
    chat, plain = load_prompts(ledger, settings, FilePrompts(file=file.id))
    assert (chat.messages[0].content, len(chat.messages), chat.completion) == ("2+2?", 1, "4")
    assert (plain.messages[0].role, plain.completion, plain.kind) == ("user", None, "explain")


def test_text_comes_back_as_text(ledger, settings, store):
    assert load_text(ledger, settings, FilePrompts(file=store(TEXT).id)) == ["It rained."]


def test_the_builtin_prompts_are_enough_for_a_recovery(ledger, settings):
    prompts = load_prompts(ledger, settings, BuiltinPrompts(builtin="general"))
    assert len({prompt.messages[0].content for prompt in prompts}) > 500
    assert len({prompt.kind for prompt in prompts}) == 14


def test_lines_may_be_blank_end_as_they_like_and_arrive_in_any_pieces(store):
    content = PROMPT + b"\r\n\r\n  \n" + '{"prompt": "Größe"}'.encode() + b"\n" + PROMPT
    pieces = [content[start : start + 3] for start in range(0, len(content), 3)]
    assert store(*pieces).rows == 3


@pytest.mark.parametrize(
    ("line", "pointer", "code"),
    [
        (b'{"prompt": ', "/line/7", "malformed_json"),
        (b'{"prompt": "\xff"}', "/line/7", "malformed_json"),
        (b"[" * 5000, "/line/7", "too_deep"),
        (b'{"prompt": NaN}', "/line/7/prompt", "invalid_value"),
        (b"[1, 2]", "/line/7", "unknown_row"),
        (b'{"question": "Why?"}', "/line/7", "unknown_row"),
        (b'{"prompt": 5}', "/line/7/prompt", "invalid_value"),
        (b'{"prompt": ""}', "/line/7/prompt", "invalid_value"),
        (b'{"prompt": "a", "answer": "b"}', "/line/7/answer", "unknown_field"),
        (b'{"messages": []}', "/line/7/messages", "invalid_value"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}',
            "/line/7/messages/1/role",
            "invalid_value",
        ),
        (b'{"messages": [{"role": "system", "content": "a"}]}', "/line/7", "invalid_value"),
        (TEXT, "/line/7", "mixed_rows"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_place(refusal, line, pointer, code):
    refused = refusal(b"\n".join([PROMPT] * 6 + [line] + [PROMPT]))
    assert refused.code == "invalid_dataset"
    assert [(item.pointer, item.code) for item in refused.items] == [(pointer, code)]
    assert "line 7" in refused.items[0].message
    assert "line 7" in str(refused)


def test_what_stands_in_a_bad_line_is_not_repeated(refusal):
    refused = refusal(b'{"messages": [{"role": "user", "content": 5, "password": "hunter2"}]}')
    assert "hunter2" not in str(refused.items)


def test_at_most_a_hundred_findings_are_told(refusal):
    assert len(refusal(b"{}\n" * 5000).items) == 100


def test_a_byte_order_mark_is_named(refusal):
    assert refusal(b"\xef\xbb\xbf" + PROMPT).items[0].code == "byte_order_mark"


@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_a_data_set_without_rows_is_refused(refusal, content):
    assert refusal(content).code == "empty_dataset"


def test_an_endless_line_is_refused_before_it_ends(ledger, settings):
    def endless():
        yield PROMPT + b"\n"
        while True:
            yield b"x" * (1 << 19)

    with pytest.raises(Unprocessable) as refused:
        store_file(ledger, settings, Upload("data.jsonl", "fine-tune"), endless())
    assert refused.value.code == "line_too_long"
    assert refused.value.items[0].pointer == "/line/2"


def test_a_data_set_of_too_many_lines_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINES", 3)
    assert refusal((PROMPT + b"\n") * 4, error=TooLarge).code == "too_many_rows"


def test_a_data_set_of_too_many_bytes_is_refused(refusal, monkeypatch):
    monkeypatch.setattr("recoup_jobs.datasets.MOST_BYTES", 100)
    assert refusal((PROMPT + b"\n") * 4, error=TooLarge).code == "file_too_large"


def test_an_upload_that_breaks_off_leaves_nothing(ledger, settings):
    def broken():
        yield PROMPT
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        store_file(ledger, settings, Upload("data.jsonl", "fine-tune"), broken())
    assert list(settings.files_dir.iterdir()) == []
    assert catalog.find(ledger, "default", None, 10).data == []


def test_prompts_are_not_read_as_text(ledger, settings, store):
    with pytest.raises(Unprocessable, match="holds prompts"):
        load_text(ledger, settings, FilePrompts(file=store(PROMPT).id))


def test_files_are_listed_newest_first(ledger, store):
    stored = [store(PROMPT).id for _ in range(3)]
    first = catalog.find(ledger, "default", None, 2)
    rest = catalog.find(ledger, "default", first.next_cursor, 2)
    assert [file.id for file in first.data + rest.data] == stored[::-1]


def test_a_deleted_file_is_gone(ledger, settings, store):
    file = store(PROMPT)
    delete_file(ledger, settings, file.id, "default")
    with pytest.raises(NotFound):
        catalog.get(ledger, file.id, "default")
    assert list(settings.files_dir.iterdir()) == []


def test_a_file_that_a_recovery_needs_is_kept_until_it_ends(ledger, settings, store, asked):
    file = store(PROMPT)
    job = ledger.create(asked.model_copy(update={"prompts": FilePrompts(file=file.id)}), "gpu.cpu")
    with pytest.raises(Conflict, match=job.id):
        delete_file(ledger, settings, file.id, "default")
    ledger.cancel(job.id)
    delete_file(ledger, settings, file.id, "default")


def test_a_row_of_json_is_what_json_says(store, ledger, settings):
    awkward = 'tab\t quote" \u2028 end'
    file = store(json.dumps({"prompt": awkward}).encode())
    assert load_prompts(ledger, settings, FilePrompts(file=file.id))[0].messages[0].content == awkward
