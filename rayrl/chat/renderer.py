"""Convert messages to token ids and back: the only module that tokenizes.

A conversation grows by appending ids. Nothing that a model wrote is ever tokenized again, so the
learner trains on exactly the ids that were sampled. The template is rendered with sentinels as
contents to find the text around them (role headers, end of turn). In that text the control tokens
are renamed to secret names (`chat.tokenizer`), the contents are inserted, and the whole is encoded
at once: `<|im_end|>` typed by a user stays text, and all other ids are those that the tokenizer
gives for the rendered template.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from rayrl.chat.tokenizer import (
    TextTokenizer,
    byte_level_alphabet,
    control_ids,
    copy_backend,
    fold,
    gap_before_eos,
    load_tokenizer,
    max_token_chars,
    tokenizer_name,
    without_punctuation,
)
from rayrl.chat.tools import (
    CALL_MARKS,
    THOUGHT_MARKS,
    ParsedCall,
    add_to_first_message,
    as_user_messages,
    describe_tools,
    new_tools,
    parse_calls,
    tool_name,
)
from rayrl.errors import ConfigError
from rayrl.types import Message, Role, Turn
from rayrl.weights.model_dir import explain_load_error, model_dir

__all__ = ["Chat", "Ids"]

Ids = tuple[int, ...]

_CACHE_SIZE = 4096  # entries per cache
_MAX_CACHED_LENGTH = 4096  # characters or ids of a cached encoding or decoding
_MAX_CACHED_MESSAGES = 1024  # messages in a cached sequence of roles
_MAX_CACHED_TOOLS = 65_536  # characters of cached tool schemas
_REMEDY = "use a model whose tokenizer has a chat template that only appends (ChatML does)"
_NO_PARAMETERS = {"type": "object", "properties": {}}
_PROBE = {
    "type": "function",
    "function": {"name": "PROBETOOL", "description": "", "parameters": _NO_PARAMETERS},
}
_PROBE_CALL = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "PROBETOOL", "arguments": {"x": 1}},
}


_SENTINEL = re.compile(r"RAYRLSENTINEL(\d+)X")


def _sentinel(index: int) -> str:
    return f"RAYRLSENTINEL{index}X"


class Chat:
    """A tokenizer and its chat template: converts messages to ids and ids to text.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.

    Attributes:
        stop_ids: ids that end a model's turn; the first is the template's own end of turn.

    Raises:
        ConfigError: the tokenizer has no chat template or no end-of-turn token, or the template
            does not render every message, so that conversations cannot grow by appending.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not getattr(tokenizer, "chat_template", None):
            lacking = "fast tokenizer" if backend is None else "chat template"
            raise ConfigError(f"tokenizer {tokenizer_name(tokenizer)} has no {lacking}: {_REMEDY}")
        self.tokenizer = tokenizer
        self._backend = copy_backend(backend)
        self._max_token_chars = max_token_chars(json.loads(self._backend.to_str()))
        self._pieces: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._accepted: dict[tuple[str, ...], bool] = {}
        self._bytes = byte_level_alphabet() if "ByteLevel" in str(backend.decoder) else {}
        self._strips_contents = f"  {_sentinel(0)}  " not in self._template(["user"], pad="  ")
        tail = self._split(self._after_reply(["user"]), range(2, 3))[0]
        self._text = self._text_tokenizer(tail)
        first = self._backend.encode(tail, add_special_tokens=False).ids[:1]
        if not first or first[0] not in self._text.control:
            raise ConfigError(
                f"the chat template of {tokenizer_name(tokenizer)} ends an assistant's turn with "
                f"{tail!r}, which does not start with a special token: {_REMEDY}"
            )
        eos: int | None = getattr(tokenizer, "eos_token_id", None)
        self.stop_ids: Ids = (*first,) if eos is None or eos in first else (*first, eos)
        self._encode_cached = functools.lru_cache(_CACHE_SIZE)(self._text.encode)
        self._decode_cached = functools.lru_cache(_CACHE_SIZE)(self._decode)

    @classmethod
    def load(cls, path: str) -> Chat:
        """Load the tokenizer of the model `path`, a directory or the embedded base model.

        Raises:
            ConfigError: there is no tokenizer, or it cannot be used.
        """
        folder = model_dir(path)
        try:
            tokenizer = load_tokenizer(folder)
        except Exception as error:
            raise ConfigError(
                f"model.path={path!r}: cannot load a tokenizer: {explain_load_error(error)}"
            ) from error
        return cls(tokenizer)

    # ---- messages to ids

    def start(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ids:
        """Encode a new conversation, up to the start of the model's reply.

        Args:
            messages: the conversation so far.
            tools: JSON schemas of the functions the model may call. Unless the template supports
                tools in the call format of `chat.tools`, they are described in the first message
                and results become user messages.
        """
        messages = self._adapt_roles(self._adapt_results(messages))
        if tools:
            if self.has_native_tools:
                return self._start_with_tools(messages, tools)
            messages = add_to_first_message(messages, describe_tools(tools))
        roles = tuple(message.role for message in messages)
        key = ("start", roles)
        pieces = self._pieces.get(key)
        if pieces is None:
            text = self._text.rename_controls(self._template(roles))
            pieces = self._cache(key, self._split(text, range(len(roles))))
        return self.encode(self._join(pieces, messages))

    def extend(
        self,
        messages: Sequence[Message],
        last_ids_finished: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Ids:
        """Encode what follows a completion: end of turn if missing, messages, next reply's header.

        Args:
            messages: the next messages.
            last_ids_finished: whether the completion ended with `stop_ids[0]`. If it was truncated,
                the id is added here as part of the next prompt, so that it is not trained on.
            tools: functions offered only from now on; they are described in the first message.
        """
        messages = self._adapt_roles(self._adapt_results(messages), ("user", "assistant"))
        if tools:
            messages = add_to_first_message(messages, describe_tools(tools))
        roles = tuple(message.role for message in messages)
        key = ("extend", roles)
        pieces = self._pieces.get(key)
        if pieces is None:
            text = self._text.rename_controls(self._after_reply(roles))
            pieces = self._cache(key, self._split(text, range(2, 2 + len(roles))))
        ids = self.encode(self._join(pieces, messages))
        return ids[1:] if last_ids_finished else ids

    def encode(self, text: str) -> Ids:
        """Encode a text by itself; control tokens written in it are encoded as plain text."""
        if len(text) > _MAX_CACHED_LENGTH:
            return self._text.encode(text)
        return self._encode_cached(text)

    def min_ids(self, texts: Iterable[str]) -> int:
        """Return a lower bound on the number of ids of contents, from their length alone.

        Serves to refuse far too long contents without tokenizing them. 0 if there is no bound.
        """
        if not self._max_token_chars:
            return 0
        size = sum(len(text.strip() if self._strips_contents else text) for text in texts)
        return -(-size // self._max_token_chars)

    def reply(self, text: str) -> Ids:
        """Encode a model's whole reply, including the end of turn, for supervised training."""
        text = self._with_call_tokens(text)
        if self._reply_needs_context:
            for context in self._reply_contexts:
                before, whole = self.encode(context), self.encode(context + text)
                if whole[: len(before)] == before:
                    return (*whole[len(before) :], self.stop_ids[0])
        return (*self.encode(text), self.stop_ids[0])

    def render(self, turns: Sequence[Turn]) -> tuple[Ids, tuple[bool, ...]]:
        """Encode a conversation of a player without ids (a teacher), as if a model had played it.

        Args:
            turns: turns of one seat and one conversation, in order.

        Returns:
            ids (T,) of the whole conversation, and a mask (T,) that is True for replies.
        """
        ids: list[int] = []
        is_reply: list[bool] = []
        known: set[str] = set()
        for turn in turns:
            tools = new_tools(turn.tools, known)
            known.update(map(tool_name, tools))
            prompt = (
                self.extend(turn.prompt, True, tools) if ids else self.start(turn.prompt, tools)
            )
            reply = self.reply(turn.text)
            ids += prompt + reply
            is_reply += [False] * len(prompt) + [True] * len(reply)
        return tuple(ids), tuple(is_reply)

    def text(self, ids: Sequence[int]) -> str:
        """Decode a completion, without the ids that ended it."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        content = tuple(ids[:end])
        return self._decode_cached(content) if end <= _MAX_CACHED_LENGTH else self._decode(content)

    def document(self, text: str) -> Ids:
        """Encode a text without roles, after the token with which the tokenizer begins any text."""
        bos: int | None = getattr(self.tokenizer, "bos_token_id", None)
        prefix = list(self._backend.encode("", add_special_tokens=True).ids)
        return (*(prefix[:1] if prefix[:1] == [bos] else ()), *self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode any ids, control tokens included."""
        return self._decode(tuple(ids))

    def id_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id, which may be part of a character."""
        token = str(self._backend.id_to_token(token_id))
        if token_id not in self._backend.get_added_tokens_decoder() and self._bytes:
            with contextlib.suppress(KeyError):
                return bytes(self._bytes[character] for character in token)
        return self._decode((token_id,)).encode()

    def _decode(self, ids: Ids) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _adapt_roles(
        self, messages: Sequence[Message], before: tuple[str, ...] = ()
    ) -> Sequence[Message]:
        """Fold the messages if the template does not accept their roles after those of `before`."""
        roles = (*before, *[message.role for message in messages])
        accepted = self._accepted.get(roles)
        if accepted is None:
            try:
                text = self._template(roles)
                accepted = "system" not in roles or _sentinel(roles.index("system")) in text
            except ConfigError:
                accepted = False
            if len(roles) <= _MAX_CACHED_MESSAGES:
                if len(self._accepted) >= _CACHE_SIZE:  # a server's clients choose the keys
                    self._accepted.clear()
                self._accepted[roles] = accepted
        return messages if accepted else fold(messages)

    def _adapt_results(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Convert tool results to user messages unless the template has native tools."""
        if all(message.role != "tool" for message in messages) or self.has_native_tools:
            return messages
        return as_user_messages(messages)

    def _cache(self, key: tuple[Any, ...], pieces: tuple[str, ...]) -> tuple[str, ...]:
        if len(pieces) <= _MAX_CACHED_MESSAGES:
            if len(self._pieces) >= _CACHE_SIZE:  # a server's clients choose the keys
                self._pieces.clear()
            self._pieces[key] = pieces
        return pieces

    def _join(self, pieces: tuple[str, ...], messages: Sequence[Message]) -> str:
        """Insert the messages' contents between the pieces of a template."""
        parts = [pieces[0]]
        for message, piece in zip(messages, pieces[1:], strict=True):
            content = message.content.strip() if self._strips_contents else message.content
            if message.role == "assistant":
                content = self._with_call_tokens(content)
            parts += (content, piece)
        return "".join(parts)

    def _with_call_tokens(self, text: str) -> str:
        """Let the call marks in a model's text become tokens, where the tokenizer has such."""
        for mark, name in self._call_tokens:
            text = text.replace(mark, name)
        return text

    # ---- pieces of the template

    def _template(
        self,
        roles: Sequence[str],
        tools: Sequence[Mapping[str, Any]] | None = None,
        pad: str = "",
    ) -> str:
        """Render the template with sentinel k, between `pad`, as the content of message k.

        Raises:
            ConfigError: an unknown role, or the template refuses these messages.
        """
        for role in roles:  # roles become part of the template's text: only known ones are safe
            if role not in get_args(Role):
                raise ConfigError(f"role {role!r}: must be one of {', '.join(get_args(Role))}")
        messages = [
            {"role": role, "content": f"{pad}{_sentinel(k)}{pad}"} for k, role in enumerate(roles)
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            raise ConfigError(
                f"the chat template of {tokenizer_name(self.tokenizer)} cannot render messages by "
                f"{', '.join(roles)}: {error}. Send other roles or {_REMEDY}"
            ) from error
        return str(text)

    def _text_tokenizer(self, tail: str) -> TextTokenizer:
        """Build the tokenizer in which text cannot produce the template's control tokens.

        Some models have `<tool_call>` as one token, which only an assistant's text may produce.
        """
        turns = tail + self._template(["user"])
        with contextlib.suppress(ConfigError):  # a template without system messages
            turns += self._template(["system", "user"])
        tokenizer, tool_turns = self.tokenizer, self._tool_turns
        control = control_ids(self._backend, turns, tool_turns, tail)
        tokens = {self._backend.id_to_token(token_id) for token_id in control}
        ends = (tokenizer.bos_token, tokenizer.eos_token)
        reserved = {token for token in tokens if token in turns + tool_turns or token in ends}
        reserved |= tokens.intersection(tokenizer.all_special_tokens) - {tokenizer.unk_token}
        text = TextTokenizer(self._backend, control, reserved)
        names = [text.names.get(self._backend.token_to_id(mark)) for mark in CALL_MARKS]
        pairs = zip(CALL_MARKS, names, strict=True)
        self._call_tokens = [(mark, name) for mark, name in pairs if name is not None]
        return text

    @functools.cached_property
    def _reply_contexts(self) -> tuple[str, str, str]:
        """Texts to encode replies after: the template's own, then two if a reply merges with it."""
        end = self._text.names[self.stop_ids[0]]
        after = self._text.rename_controls(self._after_reply(["user"]))
        return "x".join(self._split(after, range(2, 3))), end + "\n", end + "x"

    @functools.cached_property
    def _reply_needs_context(self) -> bool:
        """Whether a reply has other ids by itself: some tokenizers begin a text with a space."""
        context = self._reply_contexts[0]
        return self.encode(context + "x") != self.encode(context) + self.encode("x")

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether the template opens a thought, so that a reply begins within it."""
        header = self._split(self._after_reply(["user"]), range(2, 3))[-1]
        opened, ended = map(header.rfind, THOUGHT_MARKS)
        return opened > ended

    def _after_reply(self, roles: Sequence[str]) -> str:
        """Render what follows an assistant's reply, with messages of `roles`."""
        before = self._template(["user"])
        whole = self._template(["user", "assistant", *roles])
        # right before the reply the two may differ: the prompt's ids are not rewritten
        shown, found, after = whole.partition(_sentinel(1))
        if not found or shown.partition(_sentinel(0))[:2] != before.partition(_sentinel(0))[:2]:
            raise ConfigError(
                f"the chat template of {tokenizer_name(self.tokenizer)} rewrites earlier messages, "
                f"so ids cannot be appended: it renders {shown!r}, but when the model answered it "
                f"rendered {before!r}; {_REMEDY}"
            )
        return after[len(gap_before_eos(after, self.tokenizer)) :]

    def _split(self, text: str, sentinels: range) -> tuple[str, ...]:
        """Split a rendered template at its sentinels."""
        pieces = _SENTINEL.split(text)  # with the sentinels' numbers between them
        if pieces[1::2] != [str(index) for index in sentinels]:
            raise ConfigError(
                f"the chat template of {tokenizer_name(self.tokenizer)} does not show every "
                f"message exactly once and in order: {_REMEDY}"
            )
        return tuple(pieces[::2])

    # ---- tools

    @functools.cached_property
    def _tool_turns(self) -> str:
        """A rendered conversation with a tool call; empty if the template does not list tools."""
        messages = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
            {"role": "tool", "content": "t", "tool_call_id": "call_0", "name": "PROBETOOL"},
        ]
        try:
            listed = "PROBETOOL" in self._template(["user"], tools=[_PROBE])
            self._template(["user", "assistant", "tool"])
            text = self.tokenizer.apply_chat_template(messages, tools=[_PROBE], tokenize=False)
        except Exception:  # templates raise arbitrary exceptions for unsupported messages
            return ""
        return str(text) if listed else ""

    @functools.cached_property
    def has_native_tools(self) -> bool:
        """Whether the template supports tools and writes calls in the format of `chat.tools`."""
        return ParsedCall("PROBETOOL", {"x": 1}) in parse_calls(self._tool_turns)

    def _start_with_tools(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Ids:
        """Encode a new conversation whose tools the template itself lists.

        Raises:
            ConfigError: a tool's name, description or schema would produce a control token.
        """
        roles = tuple(message.role for message in messages)
        schemas = json.dumps(list(tools))
        key = ("start", roles, schemas)
        pieces = self._pieces.get(key)
        if pieces is None:
            text = self._template(roles, list(tools))
            self._check_controls(text, roles, tools)
            pieces = self._split(self._text.rename_controls(text), range(len(roles)))
            if len(schemas) <= _MAX_CACHED_TOOLS:
                self._cache(key, pieces)
        return self.encode(self._join(pieces, messages))

    def _check_controls(
        self, text: str, roles: Sequence[str], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse tools whose schemas add control tokens to the rendered template.

        Schemas are no contents that could be inserted: a template may escape, change or join them.
        So its control tokens are compared with those for the same tools without punctuation.
        """
        tokens = [self._backend.id_to_token(token_id) for token_id in self._text.control]
        neutral = without_punctuation(list(tools), tokens)
        expected = self._text.controls_in(self._template(roles, neutral))
        found = self._text.controls_in(text)
        if found != expected:
            extra = Counter(found) - Counter(expected)
            token_id = next(iter(extra), found[0] if found else expected[0])
            token = self._backend.id_to_token(token_id)
            raise ConfigError(f"a tool's description contains {token!r}: remove it")
