"""How much each API key may ask: requests and tokens a minute, and requests at once.

A token bucket holds a minute's worth and fills evenly, so that a client may ask in bursts, and one that was refused need
not wait for a full minute. What a request will cost is known only at its end: it is charged for its prompt and the longest
answer that it allows, and gets back what it did not use. All is in memory, on the event loop: a restart forgives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from minga.serve.errors import ApiError
from minga.serve.keys import Key

_MINUTE = 60.0


class Limits:
    """Of all keys that have been seen. `clock` gives seconds and never goes back."""

    def __init__(self, *, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._states: dict[str, _State] = {}

    def admit(self, key: Key, num_tokens_estimate: int) -> Admission:
        """Charges a request. Raises `ApiError` 429, with `retry-after`, for the limit that it would break; then nothing
        is charged. A request that alone is more than a minute's tokens is refused for good: no waiting helps.
        """
        state, now = self._state(key), self._clock()
        if key.max_concurrent is not None and state.running >= key.max_concurrent:
            message = f"the limit of {key.max_concurrent} requests at once is reached; wait until one of them ends"
            raise self._refusal(key, message, seconds=1)
        if state.requests is not None and (seconds := state.requests.seconds_until(1, now)) > 0:
            message = f"the limit of {key.requests_per_minute} requests per minute is reached"
            raise self._refusal(key, message, seconds)
        if state.tokens is not None:
            if num_tokens_estimate > state.tokens.capacity:
                raise ApiError(
                    f"the request may take {num_tokens_estimate} tokens, and the limit is {key.tokens_per_minute} tokens per "
                    "minute; shorten the prompt or lower `max_tokens`",
                    status=429, code="request_too_large", headers=self.headers(key) | {"x-should-retry": "false"},
                )  # fmt: skip
            if (seconds := state.tokens.seconds_until(num_tokens_estimate, now)) > 0:
                message = f"the limit of {key.tokens_per_minute} tokens per minute is reached"
                raise self._refusal(key, f"{message}: the request may take {num_tokens_estimate}", seconds)
            state.tokens.take(num_tokens_estimate, now)
        if state.requests is not None:
            state.requests.take(1, now)
        state.running += 1
        return Admission(state, num_tokens_estimate, self._clock)

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, of the limits that the key has. `reset`: until the whole minute's worth is there."""
        state, now = self._state(key), self._clock()
        headers = {}
        for name, bucket in (("requests", state.requests), ("tokens", state.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining(now))
                headers[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.capacity, now))
        return headers

    def _refusal(self, key: Key, message: str, seconds: float) -> ApiError:
        headers = self.headers(key) | {"retry-after": str(math.ceil(seconds))}
        return ApiError(message, status=429, code="rate_limit_exceeded", headers=headers)

    def _state(self, key: Key) -> _State:
        """Of a key that is new or has other limits than before: full buckets. What it has running goes on to count."""
        state = self._states.setdefault(key.name, _State())
        if state.key != key:
            now = self._clock()
            state.key = key
            state.requests, state.tokens = _bucket(key.requests_per_minute, now), _bucket(key.tokens_per_minute, now)
        return state


class Admission:
    """A request that runs. Give it back with `release`, or as a context: that frees its place, whatever happens."""

    def __init__(self, state: _State, charged: int, clock: Callable[[], float]):
        self._state, self._charged, self._clock = state, charged, clock
        self._released = False

    def release(self, actual_tokens: int | None = None) -> None:
        """The request has ended; None: what it cost is not known, and the estimate stands. Once is enough."""
        if self._released:
            return
        self._released = True
        self._state.running -= 1
        if self._state.tokens is not None and actual_tokens is not None:
            self._state.tokens.take(actual_tokens - self._charged, self._clock())

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@dataclass
class _Bucket:
    """`level` tokens at the time `then`. It may fall below zero: who took more than was charged waits longer."""

    capacity: int
    level: float
    then: float

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self.level = min(float(self.capacity), self.level - amount)

    def remaining(self, now: float) -> int:
        self._fill(now)
        return max(0, math.floor(self.level + _ROUNDING))

    def seconds_until(self, amount: float, now: float) -> float:
        """0 if so much is there now."""
        self._fill(now)
        missing = amount - self.level
        return 0.0 if missing <= _ROUNDING else missing * _MINUTE / self.capacity

    def _fill(self, now: float) -> None:
        self.level = min(float(self.capacity), self.level + (now - self.then) * self.capacity / _MINUTE)
        self.then = now


_ROUNDING = 1e-6  # who waits exactly as long as was said must find enough


@dataclass
class _State:
    key: Key | None = None
    requests: _Bucket | None = None
    tokens: _Bucket | None = None
    running: int = 0


def _bucket(per_minute: int | None, now: float) -> _Bucket | None:
    return None if per_minute is None else _Bucket(per_minute, float(per_minute), now)


def duration(seconds: float) -> str:
    """As OpenAI's headers have it, rounded up: "0s", "120ms", "1s", "6m0s", "1h0m5s"."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
