"""A folder's tokenizer, loaded by mlx-lm without a trace on its host."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, in_a_line
from .tokenizer_files import FILES, check_vocabulary


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
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from transformers import PreTrainedConfig


def load(folder: Path) -> TokenizerWrapper:
    """Returns the tokenizer in `folder`.

    Raises UserError, naming the first of its files with which it cannot be loaded.
    """
    names = [name for name in FILES if (folder / name).exists()]
    try:
        return _loaded(folder, names)
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
    """The tokenizer of these files alone. Raises whatever the libraries raise."""
    with tempfile.TemporaryDirectory() as alone:
        for name in names:
            Path(alone, name).symlink_to((folder / name).absolute())
        # The context is checked against the model's config, not against what the tokenizer's file says of it. Nothing
        # here parses what a reply says of tools.
        unused = {"model_max_length": sys.maxsize, "tool_parser_type": None}
        return load_tokenizer(Path(alone), {"config": PreTrainedConfig(), **unused})
