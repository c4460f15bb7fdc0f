"""A byte-fallback BPE tokenizer with Gemma 4's special tokens and chat template, in a few thousand pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlx_gemma_mtp.files import hub

VOCAB = 4096
PAD, EOS, BOS, UNK, TURN, END_OF_TURN = 0, 1, 2, 3, 5, 6
STOP = (EOS, END_OF_TURN)  # a reply ends on either
SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"  # as SentencePiece writes a space
# A word keeps one leading space; runs of spaces (indentation), of newlines and of punctuation, and digits are words.
WORDS = Regex(
    r"\u2581?[A-Za-z]+|\u2581?_+[A-Za-z]*|[0-9]|\n+\u2581*|\u2581+(?=\u2581)|\u2581?[^\sA-Za-z0-9\u2581]+|\u2581+|\s+"
)
TEMPLATE = hub.DEMO / "target" / "chat_template.jinja"
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
    "unk_token": "<unk>", "mask_token": "<mask>", "clean_up_tokenization_spaces": False, "padding_side": "left",
}  # fmt: skip


def train(texts: Iterable[str], vocab_size: int = VOCAB) -> Tokenizer:
    """The tokenizer of `texts`. Deterministic; ids 0..15 are `SPECIAL`, 16..271 the bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL + BYTES,
        initial_alphabet=[],
        min_frequency=8,
        limit_alphabet=300,
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer made the bytes special; byte fallback decodes only ordinary pieces.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    # This sequence is how mlx-lm recognises a SentencePiece-like tokenizer.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the three files that transformers and mlx-lm read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = SETTINGS | {"model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of `text` without <bos>; special tokens in it are recognised."""
    return tokenizer.encode(text, add_special_tokens=False).ids
