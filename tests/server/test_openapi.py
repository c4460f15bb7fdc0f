"""The OpenAPI document: every answer and every error is as it says."""

from __future__ import annotations

import httpx
from serving import ASKED, Scripted, post, serving

from mlx_gemma_mtp.server import answers
from mlx_gemma_mtp.server.responses_schema import ResponsesAnswer

CHAT = "/v1/chat/completions"
BODY = {"messages": ASKED, "max_tokens": 6, "temperature": 0}


def test_answers_are_as_described(url):
    """Strictly: no field is left out, and none has another type."""
    asked = [
        (answers.ChatAnswer, CHAT, BODY | {"logprobs": True, "n": 2}),
        (answers.TextAnswer, "/v1/completions", {"prompt": "def", "max_tokens": 4, "logprobs": 2}),
        (answers.MessageAnswer, "/v1/messages", BODY),
        (ResponsesAnswer, "/v1/responses", {"input": "def f(x):", "max_output_tokens": 4}),
        (answers.Counted, "/v1/messages/count_tokens", {"messages": ASKED}),
        (answers.Failure, CHAT, {"messages": []}),
        (answers.MessageFailure, "/v1/messages", {"messages": [], "max_tokens": 3}),
    ]
    for kind, path, body in asked:
        kind.model_validate_json(post(url, path, body).content, strict=True)
    for kind, path in ((answers.Models, "/v1/models"), (answers.Health, "/health"), (answers.Ready, "/ready")):
        kind.model_validate_json(httpx.get(url + path).content, strict=True)


def test_the_document_names_every_answer(engine):
    with serving(Scripted(engine, lambda number: []), keys=("k",)) as url:
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        found = httpx.get(f"{url}/openapi.json", headers={"x-api-key": "k"}).json()
    for path, methods in found["paths"].items():
        for method in methods.values():
            assert "422" not in method["responses"], path
            assert "schema" in method["responses"]["200"]["content"].get("application/json", {"schema": 0}), path
            if path != "/metrics":
                assert {"200", "4XX", "5XX"} <= method["responses"].keys(), path
    assert "text/event-stream" in found["paths"][CHAT]["post"]["responses"]["200"]["content"]
    assert set(found["components"]["securitySchemes"]) == {"bearer", "x-api-key"} and found["security"]
    assert found["paths"]["/health"]["get"]["security"] == []
