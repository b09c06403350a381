"""What /v1/responses remembers: in memory, a tenant's own, and bounded."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minga.serve.errors import ApiError, json_bytes
from minga.serve.responses import ResponsesBody, item_document
from minga.serve.schema import invalid, short


@dataclass(frozen=True)
class _Kept:
    """JSON, of which nobody can change a part. items: the conversation, of which the first `num_inputs` were asked."""

    response: bytes
    items: bytes
    num_inputs: int
    output_ids: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items)


@dataclass
class _Shelf:
    """homes: the responses to which items of answers belong, by the ids of both."""

    kept: OrderedDict[str, _Kept] = field(default_factory=OrderedDict)
    homes: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def put(self, response_id: str, kept: _Kept) -> None:
        self.kept[response_id] = kept
        self.homes |= dict.fromkeys(kept.output_ids, response_id)
        self.num_bytes += kept.num_bytes

    def pop(self, response_id: str) -> None:
        kept = self.kept.pop(response_id)
        for item_id in kept.output_ids:
            del self.homes[item_id]
        self.num_bytes -= kept.num_bytes


class ResponseStore:
    """Responses in memory, each with the whole conversation up to it, so that none depends on another. A tenant sees only its
    own; where there is no room, the oldest of the tenant that holds the most goes. For one thread.
    """

    def __init__(self, *, max_responses: int = 1000, max_bytes: int = 64 << 20):
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._shelves: dict[str, _Shelf] = {}

    def put(self, tenant: str, response: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> None:
        """inputs: the items that the response answers, from the beginning of the conversation."""
        output = response["output"]
        ids = tuple(item["id"] for item in output)
        kept = _Kept(json_bytes(response), json_bytes([*inputs, *output]), len(inputs), ids)
        self._shelves.setdefault(tenant, _Shelf()).put(response["id"], kept)
        while self._is_over():
            largest = max(self._shelves, key=lambda tenant: self._shelves[tenant].num_bytes)
            self._drop(largest, next(iter(self._shelves[largest].kept)))

    def keeper(
        self, tenant: str, body: ResponsesBody, earlier: Sequence[Mapping[str, Any]] = ()
    ) -> Callable[[dict[str, Any]], None] | None:
        """What a `ResponsesWriter` does with its response; None where nothing shall be kept."""
        if body.store is False:
            return None
        inputs = [*earlier, *(item_document(item) for item in body.items)]
        return lambda response: self.put(tenant, response, inputs)

    def get(self, tenant: str, response_id: str) -> dict[str, Any]:
        return json.loads(self._find(tenant, response_id, "response_id").response)

    def conversation(self, tenant: str, response_id: str | None) -> list[dict[str, Any]]:
        """The items up to the response and with it; none where no id is given."""
        if response_id is None:
            return []
        return json.loads(self._find(tenant, response_id, "previous_response_id").items)

    def items(self, tenant: str, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is kept of the answers to which the items belong: their items by id."""
        shelf = self._shelves.get(tenant, _Shelf())
        homes = {shelf.homes[item_id] for item_id in item_ids if item_id in shelf.homes}
        outputs = (json.loads(shelf.kept[home].response)["output"] for home in homes)
        return {item["id"]: item for output in outputs for item in output}

    def input_items(self, tenant: str, response_id: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A page of the items that a response answers. query: `order` (desc if left out), `limit` (20), `after` (an id)."""
        kept = self._find(tenant, response_id, "response_id")
        items = json.loads(kept.items)[: kept.num_inputs]
        order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
        if order not in ("asc", "desc"):
            raise invalid("order", f"{short(order)} is not one of asc, desc")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= 100):
            raise invalid("limit", f"{short(limit)} is not a whole number from 1 to 100")
        if order == "desc":
            items.reverse()
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise invalid("after", f"there is no item {short(after)}")
            items = items[ids.index(after) + 1 :]
        page = items[: int(limit)]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(page) < len(items)}

    def delete(self, tenant: str, response_id: str) -> dict[str, Any]:
        self._find(tenant, response_id, "response_id")
        self._drop(tenant, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    def _find(self, tenant: str, response_id: str, field: str) -> _Kept:
        shelf = self._shelves.get(tenant)
        kept = None if shelf is None else shelf.kept.get(response_id)
        if kept is None:
            raise ApiError(
                f"there is no response {short(response_id)} here; it was not stored, or has been dropped",
                status=404, param=field, code="response_not_found",
            )  # fmt: skip
        return kept

    def _is_over(self) -> bool:
        shelves = self._shelves.values()
        num_responses, num_bytes = sum(len(s.kept) for s in shelves), sum(s.num_bytes for s in shelves)
        return num_responses > self._max_responses or num_bytes > self._max_bytes

    def _drop(self, tenant: str, response_id: str) -> None:
        shelf = self._shelves[tenant]
        shelf.pop(response_id)
        if not shelf.kept:
            del self._shelves[tenant]
