"""A chat with the local server through OpenAI's client: whole, streamed, and as JSON of a schema.

Start the server first: python -m mlx_gemma_mtp.serve
"""

import os

from openai import OpenAI
from pydantic import BaseModel

BASE = os.environ.get("BASE_URL", "http://localhost:8080")
KEY = os.environ.get("MLX_GEMMA_MTP_API_KEY", "none")


class Verdict(BaseModel):
    good: bool
    certain: bool


def main() -> None:
    with OpenAI(base_url=f"{BASE}/v1", api_key=KEY) as client:
        model = client.models.list().data[0].id
        asked = [{"role": "user", "content": "def fibonacci(n):"}]

        answer = client.chat.completions.create(model=model, messages=asked, max_tokens=64)
        print(answer.choices[0].message.content)
        details = answer.usage.completion_tokens_details
        print(f"{answer.usage.completion_tokens} tokens, {details.accepted_prediction_tokens} of them from drafts")

        for chunk in client.chat.completions.create(model=model, messages=asked, max_tokens=64, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

        verdict = client.chat.completions.parse(model=model, messages=asked, max_tokens=64, response_format=Verdict)
        print(verdict.choices[0].message.parsed)


if __name__ == "__main__":
    main()
