"""Text folders as Google's are: no post-processor that adds <bos>, Google's tokenizer_config.json, either template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text.encode import Text

DATA = Path(__file__).parent / "data" / "chat"
TARGET = hub.DEMO / "target"
VOCAB = 4096
# Of Google's tokens those that the bundled vocabulary does not have; here they take its last ids.
MORE = ('<|"|>', "<|image>", "<image|>", "<|audio>", "<audio|>", "<|image|>", "<|audio|>", "<|video|>")
SMALL, LARGE = "small", "large"  # E2B and E4B; 12B, 26B-A4B and 31B, whose replies begin with an empty thought


def google_folder(folder: Path, size: str = SMALL, template: bool = True) -> Path:
    """Makes a folder with the bundled tokenizer in Google's shape. template: False leaves it out, as in base models."""
    folder.mkdir()
    tokenizer = json.loads((TARGET / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(_with_more(tokenizer)), encoding="utf-8")
    shutil.copyfile(DATA / "tokenizer_config.json", folder / "tokenizer_config.json")
    if template:
        (folder / "chat_template.jinja").write_text(template_of(size), encoding="utf-8")
    return folder


def google_text(folder: Path, size: str = SMALL, **options: Any) -> Text:
    """Returns the Text of such a folder, which knows the media tokens."""
    media = [VOCAB - len(MORE) + MORE.index(token) for token in ("<|image|>", "<|audio|>", "<|video|>")]
    return Text(google_folder(folder, size), VOCAB, media, **options)


def template_of(size: str) -> str:
    """Returns the bundled pair's template, or its form for the larger models."""
    small = (TARGET / "chat_template.jinja").read_text(encoding="utf-8")
    large = small.replace("set large = false", "set large = true")
    assert large != small
    return large if size == LARGE else small


def cases() -> list[dict[str, Any]]:
    """Returns the conversations of data/chat, each with what Google's template makes of it."""
    return json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))


def prompt_of(case: dict[str, Any], size: str) -> str:
    """Returns the prompt that Google's template makes of a case."""
    return case.get("prompt_of_the_large_models", case["prompt"]) if size == LARGE else case["prompt"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, *calls: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """An assistant's message. calls: (name, arguments) of functions; their ids are c1, c2, ..."""
    listed = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls, 1)
    ]
    return {"role": "assistant", "content": content} | ({"tool_calls": listed} if listed else {}) | more


def tool(content: Any, id: str | None = None, name: str | None = None) -> dict[str, Any]:
    given = {"tool_call_id": id, "name": name}
    return {"role": "tool", "content": content} | {key: value for key, value in given.items() if value is not None}


def function(name: str, description: str = "Does it", **properties: Any) -> dict[str, Any]:
    """A tool as OpenAI writes it."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _with_more(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer with MORE in place of its last pieces, which no other piece is made of."""
    model = tokenizer["model"]
    first = len(model["vocab"]) - len(MORE)
    gone = {piece for piece, id in model["vocab"].items() if id >= first}
    vocab = {piece: id for piece, id in model["vocab"].items() if piece not in gone}
    merges = [pair for pair in model["merges"] if not gone.intersection((*pair, "".join(pair)))]
    plain = tokenizer["added_tokens"][0]
    added = [plain | {"id": first + i, "content": token} for i, token in enumerate(MORE)]
    vocab |= {token["content"]: token["id"] for token in added}
    return tokenizer | {
        "model": model | {"vocab": vocab, "merges": merges},
        "added_tokens": tokenizer["added_tokens"] + added,
    }
