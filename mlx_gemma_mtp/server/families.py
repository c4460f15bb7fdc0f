"""The families of figures: names, what they mean, labels and buckets; under vLLM's names where it has them."""

from __future__ import annotations

FIRST = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)  # seconds
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
WHOLE = (0.3, 0.5, 1, 1.5, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

HELP = {
    "num_requests_running": "Choices that have a row, at most.",
    "num_requests_waiting": "Choices that wait for a row, at least.",
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Tokens of replies.",
    "request_success": "Choices that ended, by their end.",
    "request_cancelled": "Requests that their client left, by phase.",
    "request_refused": "Requests that were refused because too many wait.",
    "time_to_first_token_seconds": "From a choice's arrival to its first token, waiting included.",
    "inter_token_latency_seconds": "Between two tokens, the mean of a choice: a round gives several at once.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "Before a choice's prompt was begun: its first token's time without the prefill.",
    "request_prefill_time_seconds": "Of a choice's prompt.",
    "request_decode_time_seconds": "Of a choice's tokens.",
    "request_prompt_tokens": "Tokens of a choice's prompt.",
    "request_generation_tokens": "Tokens of a choice.",
    "request_rows": "Choices that shared a round with this one, itself included, in the mean.",
    "num_preemptions": "How often a choice left its row, to go on later.",
    "prefix_cache_queries": "Prompt tokens that kept prefixes were asked for.",
    "prefix_cache_hits": "Prompt tokens that were not computed, since a prefix was kept.",
    "spec_decode_num_drafts": "Rounds of a row that verified drafts.",
    "spec_decode_num_draft_tokens": "Drafts that were verified.",
    "spec_decode_num_accepted_tokens": "Drafts that were kept.",
    "spec_decode_num_refused_tokens": "Drafts that a grammar refused before they were verified.",
    "spec_decode_num_draft_tokens_per_source": "Drafts that were verified, by their source.",
    "spec_decode_num_accepted_tokens_per_source": "Drafts that were kept, by their source.",
    "spec_decode_num_offered_tokens_per_pos": "Rounds of a row that verified a draft at this position.",
    "spec_decode_num_accepted_tokens_per_pos": "Rounds of a row that kept a draft at this position.",
    "rounds": "Rounds of a row, by the drafts that they verified and why so many.",
    "requests_without_drafts": "Choices that verified no draft, by the reason.",
    "weight_bytes": "Bytes of weights that were read for the tokens of replies, at least; rows of a round share them.",
    "weight_bytes_per_token": "The mean of these bytes for a token of a reply.",
    "memory_bandwidth_bytes_per_second": "Of this machine's memory, as the doctor measured it.",
    "memory_bandwidth_ratio": "Of this bandwidth what weights took, at least, while a choice was decoded.",
    "kv_cache_used_bytes": "K/V of the tokens that requests have.",
    "kv_cache_reserved_bytes": "K/V that requests have room for, tokens to come included.",
    "kv_cache_usage_perc": "Of the memory beside the weights what is reserved, from 0 to 1.",
    "prefix_cache_memory_bytes": "K/V in memory that are kept of prompts and replies.",
    "prefix_cache_disk_bytes": "K/V on disk that are kept of prompts and replies, those of other models included.",
    "memory_active_bytes": "Bytes of MLX's arrays.",
    "memory_peak_bytes": "The most bytes of MLX's arrays.",
    "memory_cache_bytes": "Bytes of buffers that MLX keeps unused.",
}

GAUGES = (
    *("num_requests_running", "num_requests_waiting"),
    *("memory_active_bytes", "memory_peak_bytes", "memory_cache_bytes", "weight_bytes_per_token"),
    *("kv_cache_used_bytes", "kv_cache_reserved_bytes", "kv_cache_usage_perc"),
    *("prefix_cache_memory_bytes", "prefix_cache_disk_bytes"),
)
COUNTERS = (
    *("prompt_tokens", "generation_tokens", "request_refused", "num_preemptions", "prefix_cache_queries"),
    *("prefix_cache_hits", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    *("spec_decode_num_accepted_tokens", "spec_decode_num_refused_tokens", "weight_bytes"),
)
LABELLED = {
    "request_success": ["finished_reason"],
    "request_cancelled": ["phase"],
    "spec_decode_num_draft_tokens_per_source": ["source"],
    "spec_decode_num_accepted_tokens_per_source": ["source"],
    "spec_decode_num_offered_tokens_per_pos": ["position"],
    "spec_decode_num_accepted_tokens_per_pos": ["position"],
    "rounds": ["drafts", "reason"],
    "requests_without_drafts": ["reason"],
}
HISTOGRAMS = {
    "time_to_first_token_seconds": FIRST,
    "inter_token_latency_seconds": BETWEEN,
    "e2e_request_latency_seconds": WHOLE,
    "request_queue_time_seconds": WHOLE,
    "request_prefill_time_seconds": WHOLE,
    "request_decode_time_seconds": WHOLE,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_rows": (1, 2, 4, 8, 16, 32, 64),
}
