"""Events are cut where the standard says, read by OpenAI's own decoder, wherever chunks end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from starlette.responses import JSONResponse
from starlette.types import Message

from steerserve.carried import Carried
from steerserve.errors import RequestError
from steerserve.server.events import error_in, final_event, with_report
from steerserve.server.framing import EventFramer
from steerserve.server.reply import SteeredReply
from tests.support.scale import scaled_examples

ENDS = ["\n", "\r", "\r\n"]
ends = st.sampled_from(ENDS)
lines = st.one_of(
    st.sampled_from(["data: {}", "data:x", "event: ping", ": a comment", "data", "retry: 5"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=8),
).filter(lambda line: not line.startswith("id"))  # which the client remembers from one event to the next


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Events whose lines end in any of the three ways, in one stream."""
    events = draw(st.lists(st.lists(lines, max_size=4), max_size=5))
    text = "".join("".join(line + draw(ends) for line in event) + draw(ends) for event in events)
    return text.encode()


def read(pieces: list[bytes]) -> list[tuple[str | None, str]]:
    """What OpenAI's client makes of a stream that comes in these pieces."""

    def events() -> Iterator[tuple[str | None, str]]:
        decoder = SSEDecoder()
        for raw in b"".join(pieces).splitlines():
            found = decoder.decode(raw.decode())
            if found is not None:
                yield found.event, found.data

    return list(events())


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    chunks = []
    for size in sizes:
        chunks.append(stream[:size])
        stream = stream[size:]
    return [*chunks, stream]


@given(stream=streams(), sizes=st.lists(st.integers(0, 9), max_size=60))
@scaled_examples(500, 100)
def test_pieces_are_whole_events_and_lose_no_byte(stream: bytes, sizes: list[int]) -> None:
    framer = EventFramer()
    pieces = [framer.feed(chunk) for chunk in cut(stream, sizes)]
    rest = framer.rest()
    assert b"".join(pieces) + rest == stream
    # Each piece by itself says what it says in the stream: none begins or ends inside an event.
    alone = [event for piece in pieces for event in read([piece])]
    assert alone == read([stream[: len(stream) - len(rest)]])
    # Whatever has ended is not held back.
    assert read([rest]) == []
    assert len(read([stream])) == len(alone)


@given(stream=streams())
@scaled_examples(500, 100)
def test_an_event_leaves_with_the_byte_that_ends_it(stream: bytes) -> None:
    framer, sent = EventFramer(), b""
    for place in range(len(stream)):
        sent += framer.feed(stream[place : place + 1])
        assert read([sent]) == read([stream[: place + 1]])


REPORT = {"tokens": 1}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("space", ["", " "])
def test_each_apis_last_event_is_found_and_completed_with_any_line_ends(end: str, space: str) -> None:
    chunk = json.dumps({"id": "c", "choices": [], "text": 'a "data: [DONE]"\n event: message_stop'})
    done = f"data:{space}[DONE]{end}{end}".encode()
    stop = f'event:{space}message_stop{end}data:{space}{{"type":"message_stop"}}{end}{end}'.encode()
    response = json.dumps({"type": "response.completed", "response": {"id": "r"}})
    completed = f"event:{space}response.completed{end}data:{space}{response}{end}{end}".encode()
    head = f"data:{space}{chunk}{end}{end}".encode()
    for last in (done, stop, completed):
        assert final_event(head + last) == len(head)
        assert final_event(head) is None
        replaced = with_report(last, REPORT, head)
        assert read([replaced])[-1][0] == read([last])[-1][0]
        (report,) = [json.loads(data) for _, data in read([replaced]) if "steering" in data]
        assert report.get("response", report)["steering"] == REPORT
    assert json.loads(read([with_report(done, REPORT, head)])[0][1])["id"] == "c"


@pytest.mark.parametrize("end", ENDS)
def test_an_error_is_found_with_any_line_ends(end: str) -> None:
    events = f'data: {{"a": 1}}{end}{end}data: {{"error": {{"code": 400}}}}{end}{end}'.encode()
    assert error_in(events) == {"error": {"code": 400}}


@pytest.mark.parametrize("end", ENDS)
def test_a_stream_flows_whatever_ends_its_lines(end: str) -> None:
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def finish() -> dict[str, int]:
        return REPORT

    def refuse(error: RequestError) -> JSONResponse:
        raise error

    async def go() -> None:
        reply = SteeredReply(send, Carried(), finish, refuse)
        head = [(b"content-type", b"text/event-stream")]
        await reply.send({"type": "http.response.start", "status": 200, "headers": head})
        for number in range(3):
            event = f'data: {{"id": "c", "number": {number}}}{end}{end}'.encode()
            await reply.send({"type": "http.response.body", "body": event, "more_body": True})
            assert sent[-1] == event, "no later event is needed for this one to leave"
        done = f"data: [DONE]{end}{end}".encode()
        await reply.send({"type": "http.response.body", "body": done, "more_body": False})

    asyncio.run(go())
    *_, (_, report), (_, done) = read(sent)
    assert (json.loads(report)["id"], json.loads(report)["steering"], done) == ("c", REPORT, "[DONE]")
