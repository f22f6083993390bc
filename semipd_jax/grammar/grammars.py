"""Forms that clients ask for become grammars of llguidance.

It compiles a JSON schema to an Earley grammar over regular expressions and walks the trie of all
tokens for each mask: see https://github.com/guidance-ai/llguidance. Nothing in a form is run or
fetched, and the limits below bound what compiling and masking may take.
"""

import json
from collections import OrderedDict
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from semipd_jax.grammar.matcher import GrammarError, Matcher, check
from semipd_jax.request import SamplingParams, StructuredOutputs

_LIMITS: Final = LLParserLimits(
    max_lexer_states=25_000,  # at 2 kB each
    max_grammar_size=100_000,
    verbose_errors=False,
)
_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the tokens of JSON. Models that may write white space for ever sometimes do."""
_CACHE_SIZE: Final = 64


class Grammars:
    """Compiles forms for one model, and remembers the latest. For one thread at a time.

    To make one holds the interpreter lock for about a second per 100,000 tokens.

    Args:
      tokenizer_json: the text of the model's tokenizer.json.
      vocab_size: columns of the model's logits.
      eos_token_ids: the model's.

    Raises:
      ValueError: masks cannot be made for this tokenizer.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        eos = list(eos_token_ids) or None
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()

    def matcher(self, sampling: SamplingParams) -> tuple[Matcher, bytes]:
        """A matcher for a request with `structured_outputs`, and the mask of its first token.

        Raises:
          GrammarError: the form is wrong, not supported or too large, or no text has it.
        """
        form = sampling.structured_outputs
        assert form is not None
        compiled = self._compiled.get(form)
        if compiled is None:
            compiled = self._compiled[form] = self._compile(form)
        self._compiled.move_to_end(form)
        if len(self._compiled) > _CACHE_SIZE:
            self._compiled.popitem(last=False)
        matcher = Matcher(
            compiled.deep_copy(),
            self._vocab_size,
            self._tokenizer.eos_tokens,
            sampling.stop_token_ids,
            sampling.min_tokens,
        )
        mask = matcher.mask()
        if mask is None:
            raise GrammarError("no text with at least one token has this form")
        return matcher, mask

    def _compile(self, form: StructuredOutputs) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar_of(form), log_level=0, limits=_LIMITS)
        check(matcher)
        matcher.compute_bitmask()  # what this prepares is copied with it
        if matcher.is_stopped() and not matcher.is_accepting():
            raise GrammarError("no text has this form")
        check(matcher)
        return matcher


def field_of(form: StructuredOutputs) -> str:
    """Which of its fields says what the form is."""
    return "json" if form.json is not None else "regex" if form.regex is not None else "choice"


def grammar_of(form: StructuredOutputs) -> str:
    """Raises GrammarError if it is not a JSON object where it should be one."""
    if form.json is not None:
        options = {"whitespace_pattern": _WHITESPACE, "lenient": False}
        try:
            return LLMatcher.grammar_from_json_schema(form.json, overrides=options)  # type: ignore
        except ValueError as error:
            raise GrammarError(str(error)) from error
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    texts = " | ".join(json.dumps(text) for text in form.choice)
    return LLMatcher.grammar_from_lark(f"start: {texts}")
