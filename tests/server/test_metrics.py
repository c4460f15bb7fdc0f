"""The figures: all there at zero, and what requests add to them."""

from __future__ import annotations

import math

import httpx
from prometheus_client.parser import text_string_to_metric_families
from serving import ASKED, NAME, Scripted, ids_of, post, serving

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
