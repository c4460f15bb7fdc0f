"""The local server: OpenAI's and Anthropic's HTTP interfaces on an engine. Needs the extra `serve`."""
