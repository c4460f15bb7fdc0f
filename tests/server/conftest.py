"""One engine and one server for all tests of this folder."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
import openai
from serving import serving

from mlx_gemma_mtp import load


@pytest.fixture(scope="session")
def engine():
    with load(num_draft_tokens=3) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(engine):
    with serving(engine, aliases=("background", "claude-*")) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client
