"""Answers that no model gave, for the tests of the wires: as events, as outcomes, and behind a socket for official clients."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from hypothesis import strategies as st

from minga.engine.sampler import TokenLogprob
from minga.serve.errors import ApiError, json_bytes
from minga.serve.generation import (
    CallArguments,
    CallStart,
    Choice,
    Event,
    Finish,
    Generation,
    Outcome,
    Reasoning,
    Text,
    Usage,
    Writer,
)

TEXT = [Text(0, "Hola, "), Text(0, "¿qué tal?"), Finish(0, "stop")]
REASONED = [Reasoning(0, "They "), Reasoning(0, "greet."), Text(0, "Hola."), Finish(0, "stop")]
CALLS = [
    Reasoning(0, "Look it up."),
    Text(0, "One moment."),
    CallStart(0, 0, "call_1", "weather"),
    CallArguments(0, 0, '{"ci'),
    CallArguments(0, 0, 'ty": "Cuzco"}'),
    CallStart(0, 1, "call_2", "time"),
    CallArguments(0, 1, "{}"),
    Finish(0, "tool_calls"),
]
CUT = [Text(0, "Once upon"), Finish(0, "length")]
CUT_THOUGHT = [Reasoning(0, "Well, "), Finish(0, "length")]
CUT_CALL = [CallStart(0, 0, "call_1", "weather"), CallArguments(0, 0, '{"days": 3, "city": "Cu'), Finish(0, "length")]
FILTERED = [Text(0, "Take some "), Finish(0, "content_filter")]
STOPPED = [Text(0, "Once"), Finish(0, "stop", stop="\n\n")]
NOTHING: list[Event] = [Finish(0, "stop")]
ALL = {
    "text": TEXT, "reasoned": REASONED, "calls": CALLS, "cut": CUT, "cut thought": CUT_THOUGHT, "cut call": CUT_CALL,
    "filtered": FILTERED, "stopped": STOPPED, "nothing": NOTHING,
}  # fmt: skip
LOGPROBS = [
    Text(0, "Ho", [TokenLogprob(1, -0.5, [(1, -0.5), (2, -1.0)])]),
    Text(0, "la", [TokenLogprob(2, -0.1, [(2, -0.1), (3, -3.0)])]),
    Finish(0, "stop"),
]
USAGE = Usage(prompt=12, cached=8, completion=7, reasoning=2)


class FakeTokenizer:
    def token_bytes(self, token: int) -> bytes:
        return f"w{token}".encode()


def outcome_of(events: Sequence[Event]) -> Outcome:
    outcome = Outcome([Choice()], copy.copy(USAGE))
    for event in events:
        outcome.take(event)
    return outcome


def stream_of(writer: Writer, events: Sequence[Event]) -> bytes:
    pieces = [*writer.begin(Usage(prompt=12, cached=8))]
    for event in events:
        pieces += writer.event(event)
    return b"".join([*pieces, *writer.end(outcome_of(events))])


def read_stream(stream: bytes) -> list[dict[str, Any]]:
    """The documents; their types are what their `event:` lines say."""
    documents = []
    for block in stream.decode().split("\n\n")[:-1]:
        event, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert event == f"event: {document['type']}"
        documents.append(document)
    return documents


def pieces_of(text: str) -> st.SearchStrategy[list[str]]:
    cuts = st.lists(st.integers(0, len(text)), max_size=3).map(sorted)
    return cuts.map(lambda at: [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)])


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """Reasoning, text and calls, in this order, each perhaps absent, in any pieces."""
    events: list[Event] = []
    events += [Reasoning(0, piece) for piece in draw(st.text(max_size=8).flatmap(pieces_of))]
    events += [Text(0, piece) for piece in draw(st.text(max_size=8).flatmap(pieces_of))]
    num_calls = draw(st.integers(0, 3))
    for call in range(num_calls):
        events.append(CallStart(0, call, f"call_{call}", "weather"))
        arguments = json.dumps(
            draw(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2))
        )
        events += [CallArguments(0, call, piece) for piece in draw(pieces_of(arguments))]
    reasons = ["length", "content_filter", "tool_calls" if num_calls else "stop"]
    return [*events, Finish(0, draw(st.sampled_from(reasons)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, body: dict[str, Any]) -> Any:
    """A body with some of its values replaced, removed or doubled."""
    document = copy.deepcopy(body)
    words = sorted(set(_words(body)))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            match draw(st.sampled_from(["replace", "word", "remove", "add"])):
                case "replace":
                    place[key] = draw(JSON)
                case "word":
                    place[key] = draw(st.sampled_from(words))
                case "remove":
                    del place[key]
                case _ if isinstance(place, dict):
                    place[draw(st.sampled_from(words) | st.text(max_size=5))] = copy.deepcopy(place[key])
                case _:
                    place.append(copy.deepcopy(place[key]))
            break
    return document


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)


@contextmanager
def served(
    answer: Callable[[bytes], tuple[Writer, Sequence[Event]]],
    error_document: Callable[[ApiError], dict[str, Any]] = ApiError.document,
) -> Iterator[str]:
    """The address of a server that answers each POST with the events that `answer` makes of its body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, kind = 200, "application/json"
            try:
                writer, events = answer(self.rfile.read(int(self.headers["content-length"])))
                if writer.stream:
                    kind, reply = "text/event-stream", stream_of(writer, events)
                else:
                    reply = json_bytes(writer.document(outcome_of(events)))
            except ApiError as error:
                status, reply = error.status, json_bytes(error_document(error))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def refusal_or_generation(make: Callable[[bytes], Generation], document: Any) -> None:
    """Whatever the JSON, it is understood or refused."""
    try:
        assert isinstance(make(json_bytes(document)), Generation)
    except ApiError as error:
        assert 400 <= error.status < 500 and error.message
