"""An agent that works on four tasks at the same time, and calls tools, on the local server.

Start the server first: python -m mlx_gemma_mtp.serve
"""

import asyncio
import json
import os

from openai import AsyncOpenAI

BASE = os.environ.get("BASE_URL", "http://localhost:8080")
KEY = os.environ.get("MLX_GEMMA_MTP_API_KEY", "none")
CITIES = ("Paris", "Oslo", "Rome", "Lima")
MOST_TURNS = 4
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def get_weather(city: str) -> str:
    return f"{len(city) * 5} degrees in {city}"


async def work(client: AsyncOpenAI, model: str, task: str) -> str:
    """Returns the answer to a task; every call of a tool on the way is made and answered."""
    messages = [{"role": "user", "content": task}]
    for _ in range(MOST_TURNS):
        answer = await client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=256)
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            said = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return "no answer after so many turns"


async def main() -> None:
    async with AsyncOpenAI(base_url=f"{BASE}/v1", api_key=KEY) as client:
        model = (await client.models.list()).data[0].id
        tasks = [f"What is the weather in {city}?" for city in CITIES]
        for task, answer in zip(
            tasks, await asyncio.gather(*(work(client, model, task) for task in tasks)), strict=True
        ):
            print(f"{task} {answer}")


if __name__ == "__main__":
    asyncio.run(main())
