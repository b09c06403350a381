"""Opens the models and a port, and serves until SIGTERM or Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from minga.errors import UserError
from minga.serve.app import create_app

SHUTDOWN_SECONDS = 10  # for requests that are being answered
_BACKLOG = 128
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    models: Mapping[str, str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    runs_dir: str | Path = "runs",
    api_key: str | None = None,
    quant: str | None = None,
    speculate: bool = True,
    as_json: bool = False,
) -> None:
    """Serves the models, name -> path. Returns when told to stop, once the requests under way are answered.

    Raises `UserError` for a model that does not open, a port that is taken, or an open address without an API key. The
    port is bound before the models are opened, which takes longer, and answers after.
    """
    from minga.engine.llm import LLM  # torch: not before the flags have been checked

    key = _checked_key(os.environ.get("MINGA_API_KEY") or None if api_key is None else api_key)
    if key is None and not _is_loopback(host):
        raise UserError(
            f"{host} is open to other machines and there is no API key (serve). set --api-key or MINGA_API_KEY, "
            "or leave --host out"
        )
    with bind(host, port) as listener:
        opened = {name: LLM(path, quant=quant, speculate=speculate) for name, path in models.items()}
        app = create_app(opened, runs_dir, host=host, api_key=key)
        _listen(listener, port)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if as_json:
            print(json.dumps({"url": url, "models": list(models)}, ensure_ascii=False), flush=True)
        else:
            print(f"serving {', '.join(models)} at {url}  (page: open the address; API: /v1)", flush=True)
        run_until_signal(app, listener)


def run_until_signal(app: ASGIApp, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
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
