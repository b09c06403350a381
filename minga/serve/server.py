"""Opens the models and a port, and serves until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import math
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minga.engine.watermark import read_secret
from minga.errors import UserError
from minga.planner.cost import Rates
from minga.serve.app import create_app
from minga.serve.errors import ApiError, json_bytes
from minga.serve.keys import Keys
from minga.serve.log import AccessLog
from minga.serve.meter import Meter
from minga.serve.moderation import Guard, ModelGuard, RuleGuard
from minga.serve.service import MAX_SECONDS, Settings
from minga.serve.store import Store
from minga.serve.worker import MAX_RUNNING, MAX_WAITING

SHUTDOWN_SECONDS = 30.0  # for requests that are being answered
HEADER_SECONDS = 20.0  # for a client to say what it wants
_MAX_HEADER_BYTES = 64 << 10
_BACKLOG = 128
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """How to serve. keys_file: keys and usage; None: neither, but for `api_key`. guard: "rules", "none", a path of weights from
    `minga guard train`, or "model:PATH" of a guard model. access_log: "-" is stderr. watermark: a file with a secret.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    runs_dir: str | Path = "runs"
    api_key: str | None = None
    keys_file: str | Path | None = None
    guard: str = "rules"
    moderate: bool = False
    watermark: str | Path | None = None
    access_log: str | None = None
    deadline: float = MAX_SECONDS
    shutdown_seconds: float = SHUTDOWN_SECONDS
    max_running: int = MAX_RUNNING
    max_waiting: int = MAX_WAITING
    quant: str | None = None
    speculate: bool = True
    cache: str | None = None
    prefix_memory: str | None = None
    rates: Rates | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--max-running", self.max_running, 1),
            ("--max-waiting", self.max_waiting, 0),
            ("--timeout", self.deadline, 1),
            ("--shutdown-timeout", self.shutdown_seconds, 0),
        ):
            if not least <= value < math.inf:
                raise UserError(f"{flag} is {value} (serve). it must be {least} or more")


def serve(
    models: Mapping[str, str | Path],
    options: Options,
    *,
    as_json: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Serves the models, name -> path. Returns when told to stop, once the requests under way are answered.

    check: called before a model is opened; what it raises ends it.

    Raises `UserError` for a model that does not open, a port that is taken, or an open address without an API key. The
    port is bound before the models are opened, which takes longer, and answers after.
    """
    options = with_key(options)
    with ExitStack() as stack:
        listener = stack.enter_context(bind(options.host, options.port))
        check()
        app = open_app(models, options, stack)
        _listen(listener, options.port)
        announce(models, options.host, listener.getsockname()[1], as_json=as_json)
        run_until_signal(app, listener, options.shutdown_seconds)


def with_key(options: Options) -> Options:
    """The options with the environment's key, where they have none. Raises `UserError` for an open address without a key."""
    given = os.environ.get("MINGA_API_KEY") or None if options.api_key is None else options.api_key
    api_key = _checked_key(given)
    if api_key is None and options.keys_file is None and not _is_loopback(options.host):
        raise UserError(
            f"{options.host} is open to other machines and there is no API key (serve). set --api-key or MINGA_API_KEY, make "
            "keys with `minga keys add` and give --keys, or leave --host out"
        )
    return replace(options, api_key=api_key)


def open_app(models: Mapping[str, str | Path], options: Options, stack: ExitStack, *, engine: str = "0") -> Starlette:
    """The application with its models, of options that have been through `with_key`. What it opens, `stack` closes."""
    from minga.engine.llm import LLM  # torch: not before the flags have been checked

    settings = open_settings(options, stack, engine=engine)
    opened = {
        name: LLM(
            path,
            quant=options.quant,
            speculate=options.speculate,
            cache=options.cache,
            prefix_memory=options.prefix_memory,
        )
        for name, path in models.items()
    }
    return create_app(opened, options.runs_dir, settings)


def announce(models: Mapping[str, str | Path], host: str, port: int, *, as_json: bool) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if as_json:
        print(json.dumps({"url": url, "models": list(models)}, ensure_ascii=False), flush=True)
    else:
        print(f"serving {', '.join(models)} at {url}  (page: open the address; API: /v1, /docs)", flush=True)


def open_settings(options: Options, stack: ExitStack, *, engine: str = "0") -> Settings:
    keys, meter, api_key = None, None, options.api_key
    if options.keys_file is not None:
        store = Store(options.keys_file)
        stack.callback(store.close)
        keys, meter = Keys(store, static=api_key), Meter(store)
        stack.callback(meter.close)
    elif api_key is not None:
        keys = Keys(static=api_key)
    return Settings(
        host=options.host,
        keys=keys,
        meter=meter,
        access_log=_opened_log(options.access_log),
        guard=opened_guard(options.guard),
        moderate=options.moderate,
        rates=options.rates,
        deadline=options.deadline,
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        watermark=None if options.watermark is None else read_secret(options.watermark),
        engine=engine,
    )


def opened_guard(name: str) -> Guard | None:
    """What `Options.guard` names."""
    if name == "none":
        return None
    if name == "rules":
        return RuleGuard()
    if name.startswith("model:"):
        from minga.engine.llm import LLM
        from minga.engine.sampler import SamplingParams

        path = name.removeprefix("model:")
        return ModelGuard(LLM(path), SamplingParams(temperature=0, max_tokens=64), name=Path(path).name)
    return RuleGuard(name)


def _opened_log(path: str | None) -> AccessLog | None:
    return None if path is None else AccessLog(None if path == "-" else path)


class Connection(HttpToolsProtocol):
    """Hangs up where a request's head is too long, or takes too long to come: uvicorn itself would wait for ever."""

    _in_head = True
    _passed = False  # an end of a head or of a body, in what came last
    _num_bytes = 0  # of the head so far
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn itself has it
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._passed = False
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._stop_waiting()
        else:
            self._wait()
        if self._in_head and not self._passed:
            self._num_bytes += len(data)
            if self._num_bytes > _MAX_HEADER_BYTES:
                self._refuse(431, "the headers are too large", "headers_too_large")

    def on_headers_complete(self) -> None:
        self._in_head, self._passed, self._num_bytes = False, True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._passed = True, True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not HTTP", "invalid_http")

    def _wait(self) -> None:
        if self._timer is None:
            message = f"the request did not come within {HEADER_SECONDS:g} seconds"
            self._timer = self.loop.call_later(HEADER_SECONDS, self._refuse, 408, message, "header_timeout")

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str, code: str) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or not self._in_head:  # what is written now would stand inside an answer, or be a second one
            self.transport.close()
            return
        body = json_bytes(ApiError(message, status=status, code=code).document())
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self.transport.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def configured(app: Starlette, shutdown_seconds: float = SHUTDOWN_SECONDS) -> uvicorn.Config:
    return uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=math.ceil(shutdown_seconds),
    )  # fmt: skip


def run_until_signal(app: Starlette, listener: socket.socket, shutdown_seconds: float = SHUTDOWN_SECONDS) -> None:
    server = uvicorn.Server(configured(app, shutdown_seconds))

    def stop(*_: object) -> None:
        app.state.service.draining = True
        server.should_exit = True

    # uvicorn, once down, raises the signal again for the handler that was there before: with the default ones an
    # orderly end would count as a killed process.
    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not listening yet. Port 0 is a free one."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} does not exist (--port). take one from 0 to 65535; 0 finds a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"{host!r} is not an address of this machine (--host). leave it out for 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _address_error(error, host, port) from None
    return listener


def _listen(listener: socket.socket, port: int) -> None:
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _address_error(error, listener.getsockname()[0], port) from None


def _address_error(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} is in use (--port). stop what uses it, or let `--port 0` find a free one")
    if error.errno == errno.EACCES:
        return UserError(f"port {port} is reserved for the system (--port). take one above 1023, or `--port 0`")
    return UserError(f"cannot bind {host} ({error.strerror}). leave --host out for 127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked_key(key: str | None) -> str | None:
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError("the API key cannot be sent in a header (--api-key). use ASCII letters, digits and signs")
    return key
