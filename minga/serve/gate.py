"""Who may ask, and what every reply tells the browser.

A server on 127.0.0.1 is open to each web page that the same person visits: a page can post to it blindly, or, with a
domain name that it points at 127.0.0.1 (DNS rebinding), read the replies as its own. So the Host header must be this
server's, and an Origin, which browsers send and other clients do not, must be the page's own address.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable
from time import monotonic
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minga.serve.errors import LEFT, ApiError, a_bug
from minga.serve.keys import Key, Keys
from minga.serve.log import Access, AccessLog

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EVERY_ADDRESS = ("0.0.0.0", "::")
_REPLY_HEADERS = {
    # Trusted types: the page's own scripts cannot turn a text, such as a model's answer, into markup even by mistake.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


_PUBLIC = {"/", "/health", "/ready", "/docs"}  # the page's files too: what they ask the server for is not
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
EVERYBODY = Key("")  # who asks where no key is needed


class Gate:
    """Middleware: refuses what may not pass, names each request and its key, and logs it.

    The state of a request that passes has `key` and `request_id`; routes may put `access` there, what the log says of them.
    Bound to every address, a server has names that it does not know. There it does not check Host: the API key, which
    such a server must have, keeps strangers out. refuse: writes the reply to a request that does not pass.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        keys: Keys | None,
        access_log: AccessLog | None = None,
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
    ):
        self._app = app
        self._hosts = None if host in _EVERY_ADDRESS else {*_LOOPBACK, host.lower()}
        self._keys, self._access_log, self._refuse = keys, access_log, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, headers = monotonic(), Headers(scope=scope)
        status: int | None = None
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "key": EVERYBODY, "access": {}}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reply = MutableHeaders(scope=message)
                reply["x-request-id"] = reply["request-id"] = request_id  # OpenAI's name for it, and Anthropic's
                for name, value in _REPLY_HEADERS.items():
                    reply.setdefault(name, value)
            await send(message)

        try:
            try:
                self._check_address(headers)
                state["key"] = self._key(headers, scope["path"])
            except ApiError as error:
                refusal = await self._refuse(Request(scope), error)
                await refusal(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except Exception:
            if status is None:
                await a_bug().response()(scope, receive, send_with_headers)
            raise  # for the log
        finally:
            if self._access_log is not None:
                key, seconds = state["key"].name or None, monotonic() - began
                shown = LEFT if status is None else status
                access = Access(request_id, scope["method"], scope["path"], shown, seconds, key, **state["access"])
                self._access_log.write(access)

    def _check_address(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            message = "the Host header is not an address of this server"
            raise ApiError(message, status=403, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            message = "requests from other web pages are not allowed"
            raise ApiError(message, status=403, code="origin_not_allowed")

    def _key(self, headers: Headers, path: str) -> Key:
        if self._keys is None or path in _PUBLIC or path.startswith("/static/"):
            return EVERYBODY
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        presented = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        key = self._keys.find(presented)
        if key is None:
            message = "this server needs an API key; send a good one as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ApiError(message, status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return key


def _without_port(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # such as an unclosed bracket
        return None
