"""JSON schemas, regular expressions and grammars as constraints, through llguidance (extra `grammar`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError, clipped, in_a_line, shown
from ..speculative.guide import only
from .tool_grammar import Marks, call_grammar
from .tools import Tools

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


UNFORCED = '%llguidance {"no_forcing": true}\n'
BETWEEN = str.maketrans("", "", "\\[]()'\" \n")
# llguidance's reasons for a stop at an end of the text, and its error where no token goes on.
COMPLETE, NOWHERE = ("NoExtension", "EndOfSentence"), "NoExtensionBias"


class Grammars:
    """A compiler of grammars for one tokenizer. Making one takes llguidance a second for 262,144 tokens."""

    def __init__(self, tokenizer: Any, vocab: int, end_tokens: Sequence[int]):
        """tokenizer: a transformers fast tokenizer, which neither pads nor truncates; vocab: the width of the logits.

        Raises UserError where llguidance is not installed.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise UserError(
                "constrained decoding needs llguidance; install it: pip install 'mlx-gemma-mtp[grammar]'"
            ) from None
        from .tokenizer import source as source_of  # its libraries take seconds to import

        self.vocab, self.end_tokens = vocab, sorted(end_tokens)
        added = tokenizer.added_tokens_decoder.values()
        self._control = tuple(_bare(each.content) for each in added if each.special)
        # llguidance.hf would copy the tokenizer, which costs as much again, and then write it as text.
        self.tokenizer: LLTokenizer = LLTokenizer(source_of(tokenizer), n_vocab=vocab, eos_token=self.end_tokens)

    def compile(self, kind: str, source: str) -> Grammar:
        """Compiles a JSON schema (kind 'json_schema', as JSON text), a regular expression ('regex') or Lark
        ('grammar').

        Raises UserError for a source that is no grammar, and for one that no text satisfies.
        """
        try:
            return self._grammar(kind, source)
        except ValueError as error:
            raise UserError(f"the {kind} {shown(source)} cannot be used: {_reason(error)}; mend it") from None

    def calls(self, tools: Tools, names: Sequence[str], marks: Marks) -> Grammar:
        """Compiles the grammar of one call of one of these tools, from its opening to its closing token.

        Raises UserError for schemas that cannot be used, and for those that no call satisfies.
        """
        source = call_grammar(tools, names, marks, self._wrong)
        try:
            return self._grammar("grammar", source)
        except ValueError as error:
            which = clipped(", ".join(names), 80)
            raise UserError(f"calls of {which} cannot be bound to their schemas: {_reason(error)}; mend them") from None

    def _grammar(self, kind: str, source: str) -> Grammar:
        """Raises llguidance's ValueError of a source that it cannot read, UserError where no text satisfies it."""
        grammar = Grammar(self._matcher(kind, source), self.vocab, self.end_tokens)
        grammar.copy().check_start()
        return grammar

    def _wrong(self, lark: str) -> str | None:
        """What is wrong with a grammar in Lark, None if nothing is."""
        from llguidance import LLMatcher

        wrong, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark), self.tokenizer)
        return (messages or ["it is no grammar"])[0] if wrong else None

    def _matcher(self, kind: str, source: str) -> LLMatcher:
        """llguidance's matcher of a source, at its start. Raises ValueError."""
        from llguidance import LLMatcher

        if kind == "json_schema":
            # Without bounds on white space a model may go on with newlines for ever.
            grammar = LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_flexible": False})
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(source)
        else:
            grammar = LLMatcher.grammar_from_lark(source)
        if self._names_control(source):
            grammar = _unforced(kind, source, grammar)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer)
        matcher = LLMatcher(self.tokenizer, grammar)
        if wrong or matcher.is_error():
            raise ValueError((messages or [matcher.get_error()])[0])
        return matcher

    def _names_control(self, source: str) -> bool:
        """Whether a text that follows a grammar may hold the name of a control token."""
        bare = _bare(source)
        return any(name in bare for name in self._control)


def _bare(source: str) -> str:
    """A source without what may stand between the letters of a name, and with its letters where JSON has their
    numbers.
    """
    return re.sub(r"\\u00([0-7][0-9a-fA-F])", lambda code: chr(int(code[1], 16)), source).translate(BETWEEN)


def _unforced(kind: str, source: str, grammar: str) -> str:
    """A grammar whose forced texts are spelled as the model likes. llguidance spells them itself, and then takes the
    name of a control token for that token, which no text may hold.
    """
    if kind == "grammar":
        return grammar if "%llguidance" in grammar else f"{UNFORCED}{grammar}"
    parts = json.loads(grammar)["grammars"][0]
    schema = f"start: %json {json.dumps(parts['json_schema'])}"
    return UNFORCED + (schema if kind == "json_schema" else parts["lark_grammar"])


def _reason(error: ValueError) -> str:
    return in_a_line(error).removeprefix("ValueError: ")


class Grammar:
    """A Constraint that follows a grammar: the state of one text in llguidance's matcher."""

    def __init__(self, matcher: LLMatcher, vocab: int, end_tokens: Sequence[int], ended: bool = False):
        self.matcher, self.vocab, self.end_tokens, self.ended = matcher, vocab, end_tokens, ended

    def copy(self) -> Grammar:
        """Returns an independent copy of the state."""
        return Grammar(self.matcher.deep_copy(), self.vocab, self.end_tokens, self.ended)

    def check_start(self) -> None:
        """Raises UserError where no text follows the grammar. Computing the mask changes the matcher, so call it on a
        copy.
        """
        self.matcher.compute_bitmask()
        if self.matcher.get_error().startswith(NOWHERE):
            raise UserError("no text satisfies it")
        self._stopped()

    def mask(self) -> np.ndarray:
        """Returns the tokens that may come next, as uint32 [words]. Raises UserError where the matcher has failed,
        which is not an end of the text.
        """
        if self.ended or self._stopped():
            return only(self.end_tokens, self.vocab)
        from llguidance.numpy import fill_next_token_bitmask

        bits = np.full((1, -(-self.vocab // 32)), -1, np.int32)
        fill_next_token_bitmask(self.matcher, bits, 0)
        if self._stopped():  # while it looked; then it leaves the buffer as it was
            return only(self.end_tokens, self.vocab)
        return bits[0].view(np.uint32)

    def advance(self, token: int) -> None:
        """Takes in an emitted token. Raises UserError for a token that the grammar refuses.

        An end token is not passed to the matcher, which may count it as text.
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
