"""What Prometheus reads at /metrics, under vLLM's names, so that dashboards made for it work here.

Names, labels and buckets are those of vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py; `engine` is the
label by which vLLM tells its data-parallel engines apart, here the replicas of a server. What vLLM does not count has the
prefix `minga:`.

A request is observed once, at its end, in some 20 µs. The pauses between its tokens come as a list then: each costs 0.6 µs
in the library, a thousandth of what a model takes for a token, and a sum kept along the way would be a second histogram, ours.
What the engine counts itself is read when somebody asks (`ModelState`), and is nowhere kept twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "Metrics", "ModelState", "RequestTimes", "token_buckets"]

_LABELS = ("model_name", "engine")
_FINISH_REASONS = ("stop", "length", "abort", "error")  # shown as 0 before the first; others appear when they happen
_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_INTER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


@dataclass(frozen=True)
class RequestTimes:
    """A request that has ended, in seconds of one monotonic clock.

    Its life: arrival, queue, prefill, first token, decode, end. Phases that it did not reach are None.
    inter_token_seconds: between one token, or several that came at once, and the next.
    """

    model: str
    finish_reason: str  # of the answer; "abort" where the client went away, "error" where the server failed
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_seconds: float
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    first_token_seconds: float | None = None  # from arrival
    decode_seconds: float | None = None
    inter_token_seconds: Sequence[float] = ()


@dataclass(frozen=True)
class ModelState:
    """What a model's engine knows when it is asked: how things are, and what it has counted since it started."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float  # 0 to 1
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Metrics:
    """The numbers of a server, in a registry of its own. For the event loop only.

    models: name -> the longest context. The longest of all decides the buckets of token counts, as one model's does in vLLM.
    engine: which replica of the server this is.
    """

    def __init__(self, models: Mapping[str, int], *, engine: str = "0"):
        disable_created_metrics()  # no second series for each, with the time of its birth; vLLM leaves them out too
        self._models, self._engine = tuple(models), engine
        self._registry = CollectorRegistry()
        self._states = _States(engine)
        self._registry.register(self._states)

        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Generation tokens processed.")
        self._cache_queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._cache_hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self._success = self._counter("vllm:request_success", "Requests that ended, by reason.", "finished_reason")
        for model in models:
            for reason in _FINISH_REASONS:
                self._success.labels(model, self._engine, reason)

        sizes = token_buckets(max(models.values()))
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._answer_size = self._histogram("vllm:request_generation_tokens", "Answer tokens of a request.", sizes)
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between tokens of an answer.", _INTER_TOKEN_BUCKETS
        )
        self._total = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to end.", _LATENCY_BUCKETS)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting to be taken up.", _LATENCY_BUCKETS)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Reading the prompt.", _LATENCY_BUCKETS)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "Writing the answer.", _LATENCY_BUCKETS)

        self._malformed = self._counter("minga:malformed_tool_calls", "Tool calls that could not be read.")
        self._rejections = self._counter("minga:grammar_rejections", "Requests whose grammar or schema was refused.")
        self._blocked = self._counter("minga:moderation_blocked", "Prompts and answers that moderation blocked.")
        self._cancelled = self._counter("minga:cancelled", "Requests whose client went away.")
        self._refused = Counter(
            "minga:requests_refused", "Requests refused, by the error's code.", ("code",), registry=self._registry
        )

    def observe(self, times: RequestTimes) -> None:
        """A request that was answered, or ended otherwise once a model had taken it."""
        labels = self._labels(times.model)
        self._prompt_tokens.labels(*labels).inc(times.prompt_tokens)
        self._generation_tokens.labels(*labels).inc(times.completion_tokens)
        self._cache_queries.labels(*labels).inc(times.prompt_tokens)
        self._cache_hits.labels(*labels).inc(times.cached_tokens)
        self._success.labels(*labels, times.finish_reason).inc()
        self._prompt_size.labels(*labels).observe(times.prompt_tokens)
        self._answer_size.labels(*labels).observe(times.completion_tokens)
        for histogram, seconds in (
            (self._total, times.total_seconds),
            (self._queue, times.queue_seconds),
            (self._prefill, times.prefill_seconds),
            (self._first_token, times.first_token_seconds),
            (self._decode, times.decode_seconds),
        ):
            if seconds is not None:
                histogram.labels(*labels).observe(seconds)
        pauses = self._inter_token.labels(*labels)
        for seconds in times.inter_token_seconds:
            pauses.observe(seconds)

    def malformed_tool_call(self, model: str) -> None:
        self._malformed.labels(*self._labels(model)).inc()

    def grammar_rejected(self, model: str) -> None:
        self._rejections.labels(*self._labels(model)).inc()

    def moderation_blocked(self, model: str) -> None:
        self._blocked.labels(*self._labels(model)).inc()

    def cancelled(self, model: str) -> None:
        self._cancelled.labels(*self._labels(model)).inc()

    def refused(self, code: str) -> None:
        """code: of the `ApiError`; one of ours, for what a client sends must not become a label."""
        self._refused.labels(code).inc()

    def exposition(self, states: Mapping[str, ModelState]) -> bytes:
        """All of it as text of the type `CONTENT_TYPE`, with each model's state of this moment."""
        self._states.now = {model: states[model] for model in self._models}
        return generate_latest(self._registry)

    def _labels(self, model: str) -> tuple[str, str]:
        assert model in self._models, "a client's text must not become a label"
        return model, self._engine

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        counter = Counter(name, documentation, (*_LABELS, *labels), registry=self._registry)
        if not labels:
            self._show(counter)
        return counter

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, documentation, _LABELS, registry=self._registry, buckets=buckets)
        self._show(histogram)
        return histogram

    def _show(self, metric: Counter | Histogram) -> None:
        """From the start, as 0: a series that appears with its first event hides that event from `rate()`."""
        for model in self._models:
            metric.labels(model, self._engine)


class _States(Collector):
    """The engines' own numbers, as they are when Prometheus asks."""

    def __init__(self, engine: str) -> None:
        self.now: dict[str, ModelState] = {}
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, field, documentation in _GAUGES:
            gauge = GaugeMetricFamily(name, documentation, labels=_LABELS)
            for model, state in self.now.items():
                gauge.add_metric((model, self._engine), getattr(state, field))
            yield gauge
        for name, field, documentation in _ENGINE_COUNTERS:
            counter = CounterMetricFamily(name, documentation, labels=_LABELS)
            for model, state in self.now.items():
                counter.add_metric((model, self._engine), getattr(state, field))
            yield counter


_GAUGES = (
    ("vllm:num_requests_running", "num_requests_running", "Requests that the model answers side by side."),
    ("vllm:num_requests_waiting", "num_requests_waiting", "Requests that wait to be taken up."),
    ("vllm:kv_cache_usage_perc", "kv_cache_usage", "Share of the cache that is in use; 1 is all of it."),
)
_ENGINE_COUNTERS = (
    ("vllm:num_preemptions", "num_preemptions", "Requests that gave up their cache to others, to be read again."),
    ("vllm:spec_decode_num_drafts", "num_drafts", "Drafts made."),
    ("vllm:spec_decode_num_draft_tokens", "num_draft_tokens", "Tokens guessed in drafts."),
    ("vllm:spec_decode_num_accepted_tokens", "num_accepted_tokens", "Guessed tokens that the model accepted."),
)


def token_buckets(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `longest`."""
    steps = (mantissa * 10**exponent for exponent in count() for mantissa in (1, 2, 5))
    return list(takewhile(lambda bucket: bucket <= longest, steps))
