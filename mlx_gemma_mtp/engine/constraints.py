"""What the reply of a request must follow: thoughts, calls of tools, grammars, put together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from ..sampling.params import SamplingParams
from ..speculative.guide import Constraint
from ..text.calling import Calling, Free
from ..text.control import CLOSE, OPEN
from ..text.grammar import Grammar, Grammars
from ..text.thinking import Thinking
from ..text.tool_calls import CALL_CLOSE, CALL_OPEN, QUOTE
from ..text.tool_choice import ToolChoice
from ..text.tool_grammar import Marks
from ..text.tools import Tools

if TYPE_CHECKING:
    from ..text.encode import Text


@dataclass(frozen=True)
class Calls:
    """The tools of a call of the engine, and how its replies may call them.

    tools: None where there are none. grammar: of one call; None where no reply's calls are bound.
    """

    tools: Tools | None
    choice: ToolChoice
    grammar: Grammar | None = None

    @property
    def strict(self) -> bool:
        """Whether calls are bound: the reply must make one, or may call some tools alone, or one of them is strict."""
        names = self.choice.names
        some = bool(names) and len(names) < len(self.tools.names)
        return self.choice.forced or some or any(self.tools.strict(name) for name in names)

    @property
    def read(self) -> Tools | None:
        """The tools whose calls are taken out of the text."""
        return None if self.choice.barred else self.tools


class Constraints:
    """Makes the constraints of an engine's requests; grammars are compiled for its tokenizer once they are needed."""

    def __init__(self, text: Text, vocab: int, end_tokens: Collection[int]):
        self.text, self.vocab, self.end_tokens = text, vocab, tuple(end_tokens)
        self._compiler: Grammars | None = None
        self._making = Lock()  # of the compiler, once, whichever thread needs it first

    def calls(self, tools: Tools | None, choice: ToolChoice, bound: bool) -> Calls:
        """Returns the tools of a call of the engine. bound: whether a reply is, so that its calls are, too.

        Raises UserError for schemas that no grammar can follow, and where the vocabulary has no tokens for calls.
        """
        calls = Calls(tools, choice)
        if not choice.names or not (calls.strict or bound):
            return calls
        opening, closing = (self.text.token_id(name, "a bound call of a tool") for name in (CALL_OPEN, CALL_CLOSE))
        marks = Marks(opening, closing, self.text.template.control.get(QUOTE))
        return Calls(tools, choice, self._grammars.calls(tools, choice.names, marks))

    def of(self, params: SamplingParams, calls: Calls, in_thought: bool) -> Constraint | None:
        """Returns what a reply must follow, None where it is free. in_thought: whether the prompt opened a thought.

        Raises UserError for settings that exclude each other.
        """
        calls.choice.check(params)
        reply: Constraint | None = None
        for kind, source in params.grammars.items():
            reply = self._grammars.compile(kind, source)
        reply = self._calling(calls, reply)
        budget = params.thinking_budget
        if not (params.thinking or in_thought) or (reply is None and budget is None):
            return reply
        if budget is None and OPEN not in self.text.template.control:
            return reply  # no thought can come
        opening, closing = (self.text.token_id(name, "a thinking budget") for name in (OPEN, CLOSE))
        # A thought holds no call, which would end it, and where the reply is bound no end of the text either.
        barred = [] if calls.tools is None else [self.text.template.control.get(CALL_OPEN)]
        barred += self.end_tokens if reply is not None else ()
        barred = tuple(token for token in barred if token is not None)
        return Thinking(opening, closing, self.vocab, budget, reply, barred, in_thought)

    def _calling(self, calls: Calls, text: Constraint | None) -> Constraint | None:
        """What binds the calls of a reply and, in their place, its text."""
        control, choice = self.text.template.control, calls.choice
        marks = control.get(CALL_OPEN), control.get(CALL_CLOSE)
        if None in marks or not (choice.barred or choice.names):
            return text
        if choice.barred:
            return Calling(*marks, self.vocab, self.end_tokens, None, text=text)
        bound = calls.strict or text is not None
        if not bound and choice.several:
            return None
        call = calls.grammar if bound else Free()
        return Calling(*marks, self.vocab, self.end_tokens, call, choice.forced, choice.several, text)

    @property
    def _grammars(self) -> Grammars:
        with self._making:
            if self._compiler is None:
                self.text.check_grammar_fits()
                self._compiler = Grammars(self.text.fast_tokenizer, self.vocab, self.end_tokens)
            return self._compiler
