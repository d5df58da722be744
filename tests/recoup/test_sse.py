"""The decoder of server-sent events: whatever way a stream is cut, the events are the same."""

import pytest

from recoup._sse import Decoder, Frame

STREAM = (
    "id: 1\nevent: state\ndata: {}\n\n: ping\n\nretry: 5\n\ndata: grüß\ndata:dich\r\n\r\nid: 2\ndata: torn"
)
FRAMES = [Frame("state", "1", "{}"), Frame("", "", "grüß\ndich")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_how_the_stream_is_cut(size):
    sent, decoder = STREAM.encode(), Decoder()
    chunks = [sent[start : start + size] for start in range(0, len(sent), size)]
    assert [frame for chunk in chunks for frame in decoder.feed(chunk)] == FRAMES


def test_a_torn_event_is_whole_once_the_rest_has_come():
    decoder = Decoder()
    assert decoder.feed(b"id: 7\ndata: {") == []
    assert decoder.feed(b"}\n") == []
    assert decoder.feed(b"\n") == [Frame("", "7", "{}")]
