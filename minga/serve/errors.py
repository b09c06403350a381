"""What a refused or failed request gets: an HTTP status and OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

LEFT = 499  # the status, as nginx has it, of a request whose client went away; nobody is told


class ApiError(Exception):
    """A request that is refused or fails. `param` names the field that is to blame (`messages[1].content`)."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return types.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def document(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.document(), self.status, self.headers)


def a_bug() -> ApiError:
    """What a client is told of a failure of ours: the log has its traceback, which is not the client's business."""
    message = "the server has a bug; its log has the details"
    return ApiError(message, status=500, code="internal_error", headers={"x-should-retry": "false"})


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(document), status, headers, media_type="application/json")


def json_bytes(document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair, \ud83d, is written so in JSON too
