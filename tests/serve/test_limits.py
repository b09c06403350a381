"""pytest tests/serve/test_limits.py"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.serve.errors import ApiError
from minga.serve.keys import Key
from minga.serve.limits import Admission, Limits, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> Limits:
    return Limits(clock=clock)


def refused(limits: Limits, key: Key, tokens: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limits.admit(key, tokens)
    assert caught.value.status == 429
    return caught.value


def test_a_key_without_limits_has_none(limits: Limits) -> None:
    for _ in range(1000):
        limits.admit(Key("ana"), 10**9)
    assert limits.headers(Key("ana")) == {}


def test_requests_a_minute(limits: Limits, clock: Clock) -> None:
    key = Key("ana", requests_per_minute=4)
    for _ in range(4):
        limits.admit(key, 1)
    error = refused(limits, key)
    assert "limit of 4 requests per minute" in error.message and error.code == "rate_limit_exceeded"
    assert error.headers["retry-after"] == "15"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 14.9
    assert refused(limits, key).headers["retry-after"] == "1"
    clock.now += 0.1
    limits.admit(key, 1)
    refused(limits, key)
    clock.now += 3600
    for _ in range(4):  # no more than a minute's worth is saved up
        limits.admit(key, 1)
    refused(limits, key)


def test_keys_do_not_share(limits: Limits) -> None:
    limits.admit(Key("ana", requests_per_minute=1), 1)
    limits.admit(Key("ben", requests_per_minute=1), 1)
    refused(limits, Key("ana", requests_per_minute=1))


def test_tokens_are_charged_by_estimate_and_corrected(limits: Limits, clock: Clock) -> None:
    key = Key("ana", tokens_per_minute=600)
    admission = limits.admit(key, 500)
    assert limits.headers(key)["x-ratelimit-remaining-tokens"] == "100"
    error = refused(limits, key, 200)
    assert "limit of 600 tokens per minute" in error.message and error.headers["retry-after"] == "10"
    admission.release(50)
    admission.release(0)  # once is enough
    assert limits.headers(key)["x-ratelimit-remaining-tokens"] == "550"
    limits.admit(key, 100).release(850)  # an answer longer than was expected
    assert limits.headers(key)["x-ratelimit-remaining-tokens"] == "0"
    assert refused(limits, key).headers["retry-after"] == "31"  # 300 too many, at 10 a second
    clock.now += 31
    limits.admit(key, 10)


def test_a_request_that_never_fits_is_not_to_be_retried(limits: Limits, clock: Clock) -> None:
    key = Key("ana", tokens_per_minute=600)
    limits.admit(key, 600).release(0)
    error = refused(limits, key, 601)
    assert "601 tokens" in error.message and error.code == "request_too_large"
    assert error.headers["x-should-retry"] == "false" and "retry-after" not in error.headers


def test_requests_at_once(limits: Limits) -> None:
    key = Key("ana", max_concurrent=2)
    first = limits.admit(key, 1)
    with limits.admit(key, 1):
        error = refused(limits, key)
        assert "limit of 2 requests at once" in error.message and error.headers["retry-after"] == "1"
    with pytest.raises(KeyError), limits.admit(key, 1):
        raise KeyError
    limits.admit(key, 1)
    refused(limits, key)
    first.release()
    limits.admit(key, 1)


def test_who_is_refused_is_not_charged(limits: Limits) -> None:
    key = Key("ana", requests_per_minute=10, tokens_per_minute=100, max_concurrent=1)
    before = limits.headers(key)
    refused(limits, key, 101)
    assert limits.headers(key) == before
    admission = limits.admit(key, 60)
    admission.release(60)
    left = limits.headers(key)
    refused(limits, key, 60)
    assert limits.headers(key) == left
    limits.admit(key, 40)


def test_new_limits_count_at_once_and_what_runs_still_does(limits: Limits) -> None:
    old, new = Key("ana", requests_per_minute=1, max_concurrent=1), Key("ana", requests_per_minute=5, max_concurrent=2)
    running = limits.admit(old, 1)
    refused(limits, old)
    limits.admit(new, 1)
    refused(limits, new)
    running.release(1)
    limits.admit(new, 1)
    assert limits.headers(new)["x-ratelimit-remaining-requests"] == "3"


def test_headers(limits: Limits, clock: Clock) -> None:
    key = Key("ana", requests_per_minute=60, tokens_per_minute=6000)
    limits.admit(key, 100)
    assert limits.headers(key) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5900",
        "x-ratelimit-reset-tokens": "1s",
    }
    clock.now += 0.5
    assert limits.headers(key)["x-ratelimit-reset-tokens"] == "500ms"
    clock.now += 0.5
    assert limits.headers(key)["x-ratelimit-reset-tokens"] == "0s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (1.2, "2s"),
        (360, "6m0s"),
        (59.5, "1m0s"),
        (3605, "1h0m5s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


steps = st.tuples(
    st.floats(0, 90), st.integers(0, 150), st.integers(0, 200), st.booleans()
)  # wait, estimate, actual, ends


@given(st.lists(steps, max_size=60))
def test_no_key_gets_more_than_its_limits(history: list[tuple[float, int, int, bool]]) -> None:
    """Of requests: a minute's worth and what a bucket fills since. And who waits as long as it was told is let in."""
    clock = Clock()
    limits, key = Limits(clock=clock), Key("ana", requests_per_minute=6, tokens_per_minute=100, max_concurrent=3)
    began, admitted, running = clock.now, 0, []
    for wait, estimate, actual, ends in history:
        clock.now += wait
        try:
            running.append(_admit_patiently(limits, clock, key, estimate))
            admitted += 1
        except ApiError as error:
            assert error.code == "request_too_large" or len(running) == 3
        if running and (ends or len(running) == 3):
            running.pop(0).release(actual)
        assert len(running) <= 3
        assert admitted <= 6 + (clock.now - began) * 6 / 60 + 1e-3
        assert 0 <= int(limits.headers(key)["x-ratelimit-remaining-tokens"]) <= 100


def _admit_patiently(limits: Limits, clock: Clock, key: Key, estimate: int) -> Admission:
    """One wait for each limit is enough, the second of which may be longer."""
    for _ in range(2):
        try:
            return limits.admit(key, estimate)
        except ApiError as error:
            if error.code == "request_too_large" or "at once" in error.message:
                raise
            assert re.fullmatch("[1-9][0-9]*", error.headers["retry-after"])
            clock.now += int(error.headers["retry-after"])
    return limits.admit(key, estimate)
