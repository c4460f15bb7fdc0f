"""The figures: all there at zero, and what requests add to them."""

from __future__ import annotations

import math
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ASKED, NAME, Scripted, ids_of, post, serving

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.server.limits import Places
from mlx_gemma_mtp.server.metrics import Metrics

CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": ASKED}


def figures(url: str) -> dict[str, float]:
    """Every sample without buckets, by name and labels."""
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            assert math.isfinite(sample.value) and sample.value >= 0
            if not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(sample.labels.values())
                found[sample.name.removeprefix("mlx_gemma_mtp:") + (f" {labels}" if labels else "")] = sample.value
    return found


def test_every_figure_is_there_at_zero(engine):
    with serving(Scripted(engine, lambda number: [])) as url:
        found = figures(url)
    for name in (
        *("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total"),
        *("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "num_preemptions_total"),
        *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "request_refused_total"),
        *("spec_decode_num_accepted_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
        *("request_success_total stop", "request_success_total error", "request_cancelled_total waiting"),
    ):
        assert found[name] == 0, name
    assert found["memory_active_bytes"] > 0


def test_requests_are_counted(url):
    before = figures(url)
    answers = [
        post(url, CHAT, BODY | {"max_tokens": 12, "n": 2}).json(),
        post(url, CHAT, BODY | {"max_tokens": 5}).json(),
    ]
    post(url, CHAT, BODY | {"max_tokens": 4, "stream": True})
    after = figures(url)
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    details = [answer["usage"]["completion_tokens_details"] for answer in answers]
    assert more["generation_tokens_total"] == sum(answer["usage"]["completion_tokens"] for answer in answers) + 4
    assert more["request_success_total length"] == 4 == more["time_to_first_token_seconds_count"]
    assert more["e2e_request_latency_seconds_count"] == 3
    assert more["spec_decode_num_accepted_tokens_total"] >= sum(each["accepted_prediction_tokens"] for each in details)
    assert after["spec_decode_num_accepted_tokens_total"] <= after["spec_decode_num_draft_tokens_total"]
    assert more["spec_decode_num_drafts_total"] == more["spec_decode_num_offered_tokens_per_pos_total 0"]
    kept = sum(value for name, value in more.items() if name.startswith("spec_decode_num_accepted_tokens_per_pos"))
    assert kept == more["spec_decode_num_accepted_tokens_total"]
    assert sum(value for name, value in more.items() if name.startswith("rounds_total")) > 0
    assert more["weight_bytes_total"] > 0


def told(metrics: Metrics) -> dict[str, float]:
    """The samples of figures without buckets, by name and labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return {" ".join([s.name.removeprefix("mlx_gemma_mtp:"), *s.labels.values()]): s.value for s in samples}


def test_figures_are_the_engine_s_own(engine):
    """Summed over results whose stats say the same."""
    params = [SamplingParams(max_tokens=n, temperature=0.0, seed=n) for n in (9, 20, 33)]
    results = [engine.generate(ASKED, each, num_draft_tokens=k) for each, k in zip(params, (0, 3, "auto"), strict=True)]
    stats, metrics = [result.stats for result in results], Metrics(Places(4), 4, bandwidth=1e9)
    metrics.ended(results, 1.0, None)
    found = told(metrics)
    for position in range(max(len(each.offered) for each in stats)):
        for name, counts in (("offered", "offered"), ("accepted", "kept")):
            expected = sum((getattr(each, counts) + [0] * 16)[position] for each in stats)
            assert found[f"spec_decode_num_{name}_tokens_per_pos_total {position}"] == expected
    rounds = {name: value for name, value in found.items() if name.startswith("rounds_total")}
    expected = {}
    for each in stats:
        for drafts, reasons in each.depths.items():
            for reason, count in reasons.items():
                expected[f"rounds_total {drafts} {reason}"] = expected.get(f"rounds_total {drafts} {reason}", 0) + count
    assert rounds == expected and sum(rounds.values()) == sum(each.rounds for each in stats)
    read = sum(s.target_step_bytes * s.rounds + s.draft_step_bytes * s.drafted for s in stats)  # alone in each round
    tokens = sum(len(result.tokens) for result in results)
    assert found["weight_bytes_total"] == read > 0 and found["generation_tokens_total"] == tokens
    assert found["weight_bytes_per_token"] == pytest.approx(read / tokens)
    seconds = [s.generation_tokens / s.generation_tps for s in stats]
    rates = [
        (s.target_step_bytes * s.rounds + s.draft_step_bytes * s.drafted) / t
        for s, t in zip(stats, seconds, strict=True)
    ]
    assert found["memory_bandwidth_ratio_sum"] == pytest.approx(sum(rates) / 1e9)
    assert found["memory_bandwidth_ratio_count"] == 3 and found["memory_bandwidth_bytes_per_second"] == 1e9
    assert found["prefix_cache_hits_total"] == sum(each.cached_tokens for each in stats)
    assert found["num_preemptions_total"] == sum(each.preemptions for each in stats)
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(sum(each.ttft_s for each in stats))


def test_a_bandwidth_that_nobody_measured_is_not_made_up():
    text = Metrics(Places(4), 4).text().decode()
    assert not [line for line in text.splitlines() if "bandwidth" in line and not line.startswith("#")]
    assert text.splitlines()[-1].startswith("# memory_bandwidth_ratio is not here") and "doctor" in text
    assert "# memory_bandwidth" not in Metrics(Places(4), 4, bandwidth=1.0).text().decode()


def test_kv_of_requests_and_of_what_is_kept(engine, url):
    stream = engine.stream(ASKED, SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    during, kv = figures(url), engine.kv_bytes
    stream.close()
    assert 0 < during["kv_cache_used_bytes"] <= during["kv_cache_reserved_bytes"] and kv.used > 0
    assert 0 < during["kv_cache_usage_perc"] <= 1
    engine.generate("x y " * 600, SamplingParams(max_tokens=1))
    engine.call(lambda: None)
    after = figures(url)
    assert after["prefix_cache_memory_bytes"] == engine.prefixes.bytes > 0 == after["prefix_cache_disk_bytes"]
    assert after["kv_cache_used_bytes"] == after["kv_cache_reserved_bytes"] == 0


def test_names_are_as_prometheus_has_them(engine, url):
    """What `promtool check metrics` asks for, but for the colon of the prefix, which is vLLM's."""
    post(url, CHAT, BODY | {"max_tokens": 4})
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        name = family.name.removeprefix("mlx_gemma_mtp:")
        assert re.fullmatch("[a-z][a-z0-9_]*", name) and family.documentation.endswith(".") and family.type != "unknown"
        assert not re.search("(milli|micro|_ms|kilo|mega|giga|gauge|counter|histogram)", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))  # without what the kind adds
        for sample in family.samples:
            ends = {"counter": ("_total", "_created"), "gauge": ("",)}
            assert family.type == "histogram" or sample.name in {family.name + end for end in ends[family.type]}


def test_names_for_the_dashboards_of_vllm(engine):
    rounds = [ids_of(engine, "x"), ids_of(engine, "<turn|>")]
    with serving(Scripted(engine, lambda number: rounds), metrics_prefix="vllm:") as url:
        post(url, CHAT, BODY)
        assert "vllm:generation_tokens_total 1.0" in httpx.get(f"{url}/metrics").text


def test_two_servers_have_figures_of_their_own(engine):
    rounds = [ids_of(engine, "x"), ids_of(engine, "<turn|>")]
    scripted = Scripted(engine, lambda number: rounds)
    with serving(scripted) as one, serving(scripted) as other:
        post(one, CHAT, BODY)
        assert figures(one)["generation_tokens_total"] == 1 and figures(other)["generation_tokens_total"] == 0
