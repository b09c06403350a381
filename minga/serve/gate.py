"""Who may ask, and what every reply tells the browser.

A server on 127.0.0.1 is open to each web page that the same person visits: a page can post to it blindly, or, with a
domain name that it points at 127.0.0.1 (DNS rebinding), read the replies as its own. So the Host header must be this
server's, and an Origin, which browsers send and other clients do not, must be the page's own address.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minga.serve.protocol import ApiError

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


class Guard:
    """Middleware: refuses what may not pass, and adds the security headers to what comes back.

    Bound to every address, a server has names that it does not know. There it does not check Host: the API key, which
    such a server must have, keeps strangers out.
    """

    def __init__(self, app: ASGIApp, *, host: str, api_key: str | None):
        self._app = app
        self._hosts = None if host in _EVERY_ADDRESS else {*_LOOPBACK, host.lower()}
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _REPLY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        await (self._app if refusal is None else refusal.response())(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        host = headers.get("host", "")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            message = "the Host header is not an address of this server"
            return ApiError(message, status=403, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            message = "requests from other web pages are not allowed"
            return ApiError(message, status=403, code="origin_not_allowed")
        if self._api_key is None or _is_public(path) or self._has_key(headers.get("authorization", "")):
            return None
        message = "this server needs its API key; send it as `Authorization: Bearer KEY`"
        return ApiError(message, status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode("latin-1")
        return scheme.lower() == "bearer" and self._api_key is not None and hmac.compare_digest(given, self._api_key)


def _is_public(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/static/")


def _without_port(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # such as an unclosed bracket
        return None
