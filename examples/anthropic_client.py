"""A chat with the local server through Anthropic's client: counted, whole, and streamed.

Start the server first: python -m mlx_gemma_mtp.serve --alias "claude-*"
"""

import os

from anthropic import Anthropic

BASE = os.environ.get("BASE_URL", "http://localhost:8080")
KEY = os.environ.get("MLX_GEMMA_MTP_API_KEY", "none")


def main() -> None:
    with Anthropic(base_url=BASE, api_key=KEY) as client:
        # "" is the server's own model; with an alias any name of Anthropic's does.
        asked = {"model": "", "messages": [{"role": "user", "content": "def fibonacci(n):"}]}
        print(client.messages.count_tokens(**asked).input_tokens, "tokens of the prompt")

        message = client.messages.create(**asked, max_tokens=64, system="Be brief.")
        print("".join(block.text for block in message.content if block.type == "text"))
        print(f"{message.usage.output_tokens} tokens; it ended with {message.stop_reason}")

        with client.messages.stream(**asked, max_tokens=64) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
