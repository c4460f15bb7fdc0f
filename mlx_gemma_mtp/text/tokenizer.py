"""A folder's tokenizer, loaded by mlx-lm without a trace on its host."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, in_a_line
from ..files.safetensors import read_object
from .tokenizer_files import CONFIG, FILES, TOKENIZER, check_vocabulary


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
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer, PreTrainedConfig, TokenizersBackend

# The context is checked against the model's config, not against what the tokenizer's file says of it. Nothing here
# parses what a reply says of tools.
UNUSED = {"model_max_length": sys.maxsize, "tool_parser_type": None}
GEMMA = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}  # where a folder names none


class GemmaFolderTokenizer(TokenizersBackend):
    """A transformers tokenizer around one that is loaded: transformers' own would parse tokenizer.json twice more, and
    make the vocabulary anew from it.
    """

    def __init__(self, loaded: Tokenizer, **settings: Any):
        self._tokenizer = loaded
        super().__init__(**settings)

    @classmethod
    def convert_to_native_format(cls, **settings: Any) -> dict[str, Any]:
        """Returns the settings without the files that `loaded` takes the place of."""
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
    loaded = Tokenizer.from_file(str(folder / TOKENIZER))
    loaded.no_truncation()  # a prompt is taken whole
    loaded.no_padding()
    added = [{"id": id, **_fields(token)} for id, token in loaded.get_added_tokens_decoder().items()]
    decoder = loaded.decoder and json.loads(loaded.decoder.__getstate__())
    known = {token["content"] for token in added}
    settings = {key: token for key, token in GEMMA.items() if token in known}
    settings |= read_object(folder / CONFIG) if CONFIG in names else {}
    settings |= {"tokenizer_class": GemmaFolderTokenizer.__name__}
    with tempfile.TemporaryDirectory() as alone:
        for name in set(names) - {TOKENIZER, CONFIG}:
            Path(alone, name).symlink_to((folder / name).absolute())
        Path(alone, CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        Path(alone, TOKENIZER).write_text(json.dumps({"added_tokens": added, "decoder": decoder}), encoding="utf-8")
        return wrap(Path(alone), {"config": PreTrainedConfig(), "loaded": loaded, **UNUSED})


def _fields(token: AddedToken) -> dict[str, Any]:
    """An added token as tokenizer.json has it, without its id."""
    return {
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.special,
    }


def _check_numbered(tokenizer: TokenizerWrapper) -> None:
    """Raises ValueError where ids leave a gap, or two tokens share one: in both cases some id below the number of
    tokens has none.
    """
    if isinstance(tokenizer.detokenizer, SPMStreamingDetokenizer):
        return  # the detokenizer of Gemma's kind: it has looked at every token, and raised where there is none
    if None in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        raise ValueError("the ids leave a gap")
