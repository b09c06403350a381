"""A client that costs little: many chats side by side over plain sockets, each timed."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Heard:
    """Of one streamed answer. first, last: seconds from the request to the first and the last piece of text."""

    status: int = 0
    first: float | None = None
    last: float | None = None
    num_pieces: int = 0
    num_tokens: int = 0
    error: str | None = None


async def ask(
    port: int,
    body: dict[str, Any],
    *,
    path: str = "/v1/chat/completions",
    key: str | None = None,
    leave_after: int | None = None,
) -> Heard:
    """POSTs to the chat, or to where completions are. leave_after: hangs up after so many pieces."""
    heard, began = Heard(), time.perf_counter()
    asked = {"stream": True, "stream_options": {"include_usage": True}, **body}
    data = json.dumps(asked).encode()
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{authorization}Connection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + data)
            heard.status = int((await reader.readline()).split()[1])
            async for line in reader:
                if line.startswith(b'data: {"error"') or (heard.status != 200 and b'"error"' in line):
                    heard.error = line.decode(errors="replace")[:300]
                elif b'"content":"' in line or b'"text":"' in line:
                    heard.last = time.perf_counter() - began
                    heard.first = heard.first or heard.last
                    heard.num_pieces += 1
                    if heard.num_pieces == leave_after:
                        return heard
                elif b'"usage":{' in line:
                    heard.num_tokens = json.loads(line.partition(b" ")[2])["usage"]["completion_tokens"]
        finally:
            writer.close()
    except OSError as error:
        heard.error = repr(error)
    return heard


async def ask_all(port: int, bodies: list[dict[str, Any]], **options: Any) -> tuple[list[Heard], float]:
    """All at once; what each heard, and the seconds that it took together."""
    began = time.perf_counter()
    heard = await asyncio.gather(*(ask(port, body, **options) for body in bodies))
    return list(heard), time.perf_counter() - began
