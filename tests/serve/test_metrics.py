"""pytest tests/serve/test_metrics.py"""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minga.serve.metrics import CONTENT_TYPE, Metrics, ModelState, RequestTimes, token_buckets

IDLE = ModelState(num_requests_running=0, num_requests_waiting=0, kv_cache_usage=0.0)
TIMES = RequestTimes(
    model="m",
    finish_reason="stop",
    prompt_tokens=100,
    cached_tokens=64,
    completion_tokens=3,
    total_seconds=2.2,
    queue_seconds=0.1,
    prefill_seconds=0.9,
    first_token_seconds=1.0,
    decode_seconds=1.2,
    inter_token_seconds=(0.5, 0.7),
)
# What vLLM's Grafana board and autoscalers ask for.
VLLM_COUNTERS = (
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
)
VLLM_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
VLLM_HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens"),
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"m": 4096, "n": 512})


def samples(metrics: Metrics, **states: ModelState) -> dict[tuple, float]:
    """(name, values of its labels but the engine's, in the order of their names) -> value."""
    text = metrics.exposition({"m": IDLE, "n": IDLE} | states).decode()
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "engine")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_vllms_names_are_there_from_the_start(metrics: Metrics) -> None:
    found = samples(metrics)
    for name in VLLM_COUNTERS:
        assert found[f"vllm:{name}_total", "m"] == found[f"vllm:{name}_total", "n"] == 0
    for name in VLLM_GAUGES:
        assert found[f"vllm:{name}", "m"] == 0
    for name in VLLM_HISTOGRAMS:
        assert found[f"vllm:{name}_count", "m"] == found[f"vllm:{name}_sum", "m"] == 0
    assert found["vllm:request_success_total", "length", "m"] == 0
    assert not any(name.endswith("_created") for name, *_ in found)


def test_labels_and_types_are_vllms(metrics: Metrics) -> None:
    lines = metrics.exposition({"m": IDLE, "n": IDLE}).decode().splitlines()
    running = next(line for line in lines if line.startswith("vllm:num_requests_running{"))
    assert 'engine="0"' in running and 'model_name="m"' in running
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in lines
    assert "# TYPE vllm:prompt_tokens_total counter" in lines
    assert "# TYPE vllm:kv_cache_usage_perc gauge" in lines
    assert CONTENT_TYPE.startswith("text/plain")


def test_a_request_is_observed_once(metrics: Metrics) -> None:
    metrics.observe(TIMES)
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total", "m"] == found["vllm:prefix_cache_queries_total", "m"] == 100
    assert found["vllm:prefix_cache_hits_total", "m"] == 64
    assert found["vllm:generation_tokens_total", "m"] == 3
    assert found["vllm:request_success_total", "stop", "m"] == 1
    for name, value, count in (
        ("e2e_request_latency_seconds", 2.2, 1),
        ("request_queue_time_seconds", 0.1, 1),
        ("request_prefill_time_seconds", 0.9, 1),
        ("time_to_first_token_seconds", 1.0, 1),
        ("request_decode_time_seconds", 1.2, 1),
        ("inter_token_latency_seconds", 1.2, 2),
        ("request_prompt_tokens", 100, 1),
        ("request_generation_tokens", 3, 1),
    ):
        assert found[f"vllm:{name}_sum", "m"] == pytest.approx(value)
        assert found[f"vllm:{name}_count", "m"] == count
        assert found[f"vllm:{name}_count", "n"] == 0


def test_phases_that_were_not_reached_are_not_observed(metrics: Metrics) -> None:
    metrics.observe(
        RequestTimes(
            "m", "abort", prompt_tokens=0, cached_tokens=0, completion_tokens=0, total_seconds=1, queue_seconds=1
        )
    )
    found = samples(metrics)
    assert found["vllm:request_queue_time_seconds_count", "m"] == 1
    assert found["vllm:time_to_first_token_seconds_count", "m"] == 0
    assert found["vllm:request_prefill_time_seconds_count", "m"] == 0


def test_buckets_are_vllms(metrics: Metrics) -> None:
    metrics.observe(TIMES)
    found = samples(metrics)

    def bounds(name: str) -> list[str]:
        return [key[1] for key in found if key[0] == f"vllm:{name}_bucket" and key[2:] == ("m",)]

    first = (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
    )
    assert bounds("time_to_first_token_seconds") == [*first.split(), "+Inf"]
    between = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
    assert bounds("inter_token_latency_seconds") == [*between.split(), "+Inf"]
    whole = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert bounds(f"{name}_seconds") == [*whole.split(), "+Inf"]
    tokens = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0"
    assert bounds("request_prompt_tokens") == bounds("request_generation_tokens") == [*tokens.split(), "+Inf"]


def test_token_buckets() -> None:
    assert token_buckets(1) == [1]
    assert token_buckets(100) == [1, 2, 5, 10, 20, 50, 100]


def test_the_engines_own_numbers_are_those_of_the_moment(metrics: Metrics) -> None:
    state = ModelState(2, 3, 0.25, num_preemptions=4, num_drafts=5, num_draft_tokens=6, num_accepted_tokens=7)
    found = samples(metrics, m=state)
    assert found["vllm:num_requests_running", "m"] == 2
    assert found["vllm:num_requests_waiting", "m"] == 3
    assert found["vllm:kv_cache_usage_perc", "m"] == 0.25
    assert found["vllm:num_preemptions_total", "m"] == 4
    assert found["vllm:spec_decode_num_drafts_total", "m"] == 5
    assert found["vllm:spec_decode_num_draft_tokens_total", "m"] == 6
    assert found["vllm:spec_decode_num_accepted_tokens_total", "m"] == 7
    assert found["vllm:num_requests_running", "n"] == 0
    assert samples(metrics)["vllm:num_requests_running", "m"] == 0


def test_our_own_counters(metrics: Metrics) -> None:
    found = samples(metrics)
    ours = ("malformed_tool_calls", "grammar_rejections", "moderation_blocked", "cancelled")
    assert [found[f"minga:{name}_total", "m"] for name in ours] == [0, 0, 0, 0]
    metrics.malformed_tool_call("m")
    metrics.grammar_rejected("m")
    metrics.moderation_blocked("m")
    metrics.cancelled("m")
    metrics.refused("queue_full")
    found = samples(metrics)
    assert [found[f"minga:{name}_total", "m"] for name in ours] == [1, 1, 1, 1]
    assert [found[f"minga:{name}_total", "n"] for name in ours] == [0, 0, 0, 0]
    assert found["minga:requests_refused_total", "queue_full"] == 1


def test_two_servers_in_a_process_do_not_meet(metrics: Metrics) -> None:
    other = Metrics({"m": 4096, "n": 512})
    other.observe(TIMES)
    assert samples(metrics)["vllm:prompt_tokens_total", "m"] == 0


def test_a_name_from_a_client_becomes_no_label(metrics: Metrics) -> None:
    with pytest.raises(AssertionError):
        metrics.cancelled("other")
