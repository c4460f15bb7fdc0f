"""JSON schemas, regular expressions and grammars as constraints, through llguidance (extra `grammar`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError, clipped
from ..speculative.guide import only

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


COMPLETE = ("NoExtension", "EndOfSentence")  # llguidance's reasons for a stop at an end of the text


class Grammars:
    """Compiles grammars for one tokenizer, which llguidance takes a second to read for 262,144 tokens."""

    def __init__(self, tokenizer: Any, vocab: int, end_tokens: Sequence[int]):
        """tokenizer: a transformers fast tokenizer; vocab: the width of the logits.

        Raises UserError where llguidance is not installed.
        """
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise UserError(
                "constrained decoding needs llguidance; install it: pip install 'mlx-gemma-mtp[grammar]'"
            ) from None
        self.vocab, self.end_tokens = vocab, sorted(end_tokens)
        self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocab, eos_token=self.end_tokens)

    def compile(self, kind: str, source: str | Mapping[str, Any]) -> Grammar:
        """kind: 'json_schema', 'regex' or 'grammar'; source: a schema (JSON text or object), an expression, or Lark.

        Raises UserError for a source that is no grammar, and for one that nothing satisfies.
        """
        from llguidance import LLMatcher

        if kind == "json_schema":
            text = json.dumps(_schema(source))
            # Without bounds on white space a model may go on with newlines for ever.
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(source)
        else:
            grammar = LLMatcher.grammar_from_lark(source)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer)
        matcher = LLMatcher(self.tokenizer, grammar)
        if wrong or matcher.is_error():
            reason = " ".join((messages or [matcher.get_error()])[0].split())
            raise UserError(f"the {kind} {_short(source)} cannot be used: {clipped(reason)}; mend it")
        return Grammar(matcher, self.vocab, self.end_tokens)


class Grammar:
    """A Constraint: one text's way through a grammar."""

    def __init__(self, matcher: LLMatcher, vocab: int, end_tokens: Sequence[int], ended: bool = False):
        self.matcher, self.vocab, self.end_tokens, self.ended = matcher, vocab, end_tokens, ended

    def copy(self) -> Grammar:
        return Grammar(self.matcher.deep_copy(), self.vocab, self.end_tokens, self.ended)

    def mask(self) -> np.ndarray:
        """Raises UserError where the matcher has failed, which is no end of the text."""
        if self.ended or self._stopped():
            return only(self.end_tokens, self.vocab)
        from llguidance.numpy import fill_next_token_bitmask

        bits = np.full((1, -(-self.vocab // 32)), -1, np.int32)
        fill_next_token_bitmask(self.matcher, bits, 0)
        if self._stopped():  # while it looked; then it leaves the buffer as it was
            return only(self.end_tokens, self.vocab)
        return bits[0].view(np.uint32)

    def advance(self, token: int) -> None:
        """End tokens are kept from the matcher, which would count one as text or not by its state. Raises UserError for
        a token that the grammar refuses.
        """
        if token in self.end_tokens:
            self.ended = True
        elif not self.ended and not self.matcher.consume_token(token):
            self._stopped()
            raise UserError(f"the grammar refuses token {token}; expected one that its mask allows")

    def _stopped(self) -> bool:
        """Whether the text is complete. Raises UserError for any other stop: an error, or a limit of the library."""
        if not self.matcher.is_stopped():
            return False
        reason = self.matcher.stop_reason()
        if self.matcher.is_error() or reason not in COMPLETE:
            what = (self.matcher.get_error() or reason).partition("\n")[0]
            raise UserError(f"the grammar stopped amid the text: {what}; make it simpler, or bound its repetitions")
        return True


def _schema(source: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(source, str):
        return dict(source)
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise UserError(f"the json_schema {_short(source)} is no JSON: {error}; give a JSON schema") from None
    if not isinstance(schema, dict):
        raise UserError(f'the json_schema is {_short(source)}, expected an object such as {{"type": "object"}}')
    return schema


def _short(source: str | Mapping[str, Any]) -> str:
    text = " ".join((source if isinstance(source, str) else json.dumps(dict(source))).split())
    return repr(text if len(text) <= 60 else f"{text[:59]}\u2026")
