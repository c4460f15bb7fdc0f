"""A folder's tokenizer: tokenizer.json is parsed once, and mlx-lm makes the rest of it, without a trace on its host."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, in_a_line, shown
from ..files.files import content
from ..files.safetensors import read_object
from .tokenizer_files import FILES, TOKENIZER, check_vocabulary, listed_tokens


@contextmanager
def _host_unchanged() -> Iterator[None]:
    """mlx_lm lowers the process's limit of open files, for good, and sets a variable of the environment: a library
    leaves both to its host.
    """
    environment, setrlimit = dict(os.environ), resource.setrlimit
    resource.setrlimit = lambda *_: None  # a hard limit that was lowered cannot be raised again
    try:
        yield
    finally:
        resource.setrlimit = setrlimit
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


with _host_unchanged():
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
    from mlx_lm.tokenizer_utils import load as wrap
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedConfig, TokenizersBackend

CONFIG = "tokenizer_config.json"
# The context is checked against the model's config, not against what the tokenizer's file says of it. Nothing here
# parses what a reply says of tools.
UNUSED = {"model_max_length": sys.maxsize, "tool_parser_type": None}
GEMMA = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}  # where a folder names none


@dataclass(frozen=True)
class _File:
    """A tokenizer.json that was parsed. plain: whether `tokenizer` is as the file says, which wants nothing padded or
    cut. added: its added tokens. stamp: what tells whether the file is still the same.
    """

    path: Path
    tokenizer: Tokenizer
    plain: bool
    added: list[dict[str, Any]]
    stamp: tuple[int, ...]

    @classmethod
    def parse(cls, path: Path) -> _File:
        """Raises UserError for an added token that gets another id than the file says, and whatever the tokenizers
        library raises.
        """
        stamp = _stamp(path)
        data = content(path)
        tokenizer = Tokenizer.from_buffer(data)
        for token, id in listed_tokens(data):
            if (found := tokenizer.token_to_id(token)) != id:  # the library numbers what does not fit anew
                raise UserError(f"{shown(token)} has the id {id} among added_tokens, where the vocabulary says {found}")
        plain = tokenizer.truncation is None and tokenizer.padding is None
        tokenizer.no_truncation()  # a prompt is taken whole
        tokenizer.no_padding()
        return cls(path, tokenizer, plain, _added(tokenizer), stamp)

    def source(self) -> str:
        """Returns the path of a file with this tokenizer, or such a file's text.

        It is the file itself where that still holds the same, tokens that were added since included: to write 30 MB
        anew takes a sixth of what llguidance then does with them.
        """
        with suppress(OSError):  # the file is gone
            if self.plain and self.added == _added(self.tokenizer) and self.stamp == _stamp(self.path):
                return str(self.path)
        return self.tokenizer.to_str()


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _added(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The added tokens as tokenizer.json lists them."""
    return [
        {
            "id": id,
            "content": token.content,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "special": token.special,
        }
        for id, token in sorted(tokenizer.get_added_tokens_decoder().items(), key=lambda item: item[0])
    ]


class GemmaFolderTokenizer(TokenizersBackend):
    """A transformers tokenizer around one that is parsed: transformers' own would parse tokenizer.json twice more, and
    make the vocabulary anew from it.
    """

    def __init__(self, file: _File, **settings: Any):
        self._tokenizer, self.file = file.tokenizer, file
        super().__init__(**settings)

    @classmethod
    def convert_to_native_format(cls, **settings: Any) -> dict[str, Any]:
        """Returns the settings without the files that `file` takes the place of."""
        return {key: value for key, value in settings.items() if key not in ("tokenizer_file", "tokenizer_object")}

    def get_vocab(self) -> Mapping[str, int]:
        """Returns token -> id without making a dict of it: mlx_lm asks it three times for a few names."""
        return _Vocabulary(self._tokenizer)

    def convert_ids_to_tokens(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> Any:
        """Returns the token of an id, or those of several; None for an id without one."""
        if isinstance(ids, int) or skip_special_tokens:
            return super().convert_ids_to_tokens(ids, skip_special_tokens)
        return list(map(self._tokenizer.id_to_token, ids))  # in half the time for a whole vocabulary


AutoTokenizer.register(GemmaFolderTokenizer, fast_tokenizer_class=GemmaFolderTokenizer, exist_ok=True)


class _Vocabulary(Mapping[str, int]):
    """A tokenizer's tokens and their ids. A look-up takes microseconds; going through all of them makes a dict."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __getitem__(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokenizer.get_vocab())


def source(tokenizer: TokenizersBackend) -> str:
    """Returns the path of a tokenizer.json that holds this tokenizer, or the text of one: llguidance takes either.

    tokenizer: one of transformers that neither pads nor truncates; the path is known of those that `load` made.
    """
    if isinstance(tokenizer, GemmaFolderTokenizer):
        return tokenizer.file.source()
    return tokenizer.backend_tokenizer.to_str()


def load(folder: Path) -> TokenizerWrapper:
    """Returns the tokenizer in `folder`. Parses tokenizer.json once.

    Raises UserError, naming the first of its files with which it cannot be loaded.
    """
    names = [name for name in FILES if (folder / name).exists()]
    try:
        tokenizer = _loaded(folder, names)
        _check_numbered(tokenizer)
        return tokenizer
    except Exception as error:  # the tokenizers library raises Exception itself
        check_vocabulary(folder)
        reason = in_a_line(error)
    for count in range(1, len(names)):
        try:
            _loaded(folder, names[:count])
        except Exception as error:
            raise UserError(
                f"{folder / names[count - 1]} cannot be used ({in_a_line(error)}); download it again"
            ) from None
    raise UserError(f"{folder / names[-1]} cannot be used ({reason}); download it again")


def _loaded(folder: Path, names: Sequence[str]) -> TokenizerWrapper:
    """The tokenizer of these files alone. Raises whatever the libraries raise.

    transformers and mlx_lm are given a tokenizer.json that has all that they read of it: not the vocabulary.
    """
    file = _File.parse(folder / TOKENIZER)
    decoder = file.tokenizer.decoder and json.loads(file.tokenizer.decoder.__getstate__())
    known = {token["content"] for token in file.added}
    settings = {key: token for key, token in GEMMA.items() if token in known}
    settings |= read_object(folder / CONFIG) if CONFIG in names else {}
    settings |= {"tokenizer_class": GemmaFolderTokenizer.__name__}
    with tempfile.TemporaryDirectory() as alone:
        for name in set(names) - {TOKENIZER, CONFIG}:
            Path(alone, name).symlink_to((folder / name).absolute())
        Path(alone, CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        Path(alone, TOKENIZER).write_text(
            json.dumps({"added_tokens": file.added, "decoder": decoder}), encoding="utf-8"
        )
        return wrap(Path(alone), {"config": PreTrainedConfig(), "file": file, **UNUSED})


def _check_numbered(tokenizer: TokenizerWrapper) -> None:
    """Raises ValueError where ids leave a gap, or two tokens share one: in both cases some id below the number of
    tokens has none.
    """
    if isinstance(tokenizer.detokenizer, SPMStreamingDetokenizer):
        return  # the detokenizer of Gemma's kind: it has looked at every token, and raised where there is none
    if None in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        raise ValueError("the ids leave a gap")
