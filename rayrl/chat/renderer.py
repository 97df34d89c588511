"""Messages into ids and back: the only module that tokenizes.

A conversation grows by appending ids. Nothing a model wrote is ever tokenized again, so the ids the
learner trains on are the ids that were sampled. What the template writes around contents (role
headers, end of turn) is found by rendering it with sentinels in their place. Contents are put there
once its control tokens go by names that no text has (`chat.tokenizer`), and the whole is encoded at
once: `<|im_end|>` typed by a user stays text, and all other ids are those that the tokenizer gives
for the template's text.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from rayrl.chat.template import fold, gap, without_marks
from rayrl.chat.tokenizer import (
    TextTokenizer,
    byte_level,
    control_ids,
    copy_of,
    load_tokenizer,
    longest_token,
    name_of,
)
from rayrl.chat.tools import (
    CALL_MARKS,
    THOUGHT_MARKS,
    ParsedCall,
    as_user_messages,
    describe,
    introduce,
    parse_calls,
    tool_name,
    untold,
)
from rayrl.errors import ConfigError
from rayrl.types import Message, Role, Turn
from rayrl.weights.model_dir import explain_load_error, model_dir

__all__ = ["Chat", "Ids"]

Ids = tuple[int, ...]

_CACHED = 4096  # encodings and decodings kept
_CACHED_LENGTH = 4096  # characters or ids of the longest one kept
_CACHED_MESSAGES = 1024  # of the longest sequence of roles whose pieces are kept
_CACHED_LISTING = 65_536  # characters of the longest listing of tools, likewise
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
    """A tokenizer and its chat template, as functions from messages to ids.

    Args:
        tokenizer: a fast Hugging Face tokenizer that has a chat template.

    Attributes:
        stop_ids: ids that end a model's turn; the first is the template's own end of turn.

    Raises:
        ConfigError: no chat template, no end-of-turn token, or a template that does not show every
            message, so that nothing can be appended to what it renders.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not getattr(tokenizer, "chat_template", None):
            what = "fast tokenizer" if backend is None else "chat template"
            raise ConfigError(f"tokenizer {name_of(tokenizer)} has no {what}: {_REMEDY}")
        self.tokenizer = tokenizer
        self._control = copy_of(backend)
        self._longest = longest_token(json.loads(self._control.to_str()))
        self._pieces: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._fits: dict[tuple[Any, ...], bool] = {}
        self._trims = False
        self._bytes = byte_level() if "ByteLevel" in str(backend.decoder) else {}
        tail = self._probe()
        self._text = self._text_tokenizer(tail)
        first = self._control.encode(tail, add_special_tokens=False).ids[:1]
        if not first or first[0] not in self._text.control:
            raise ConfigError(
                f"the chat template of {name_of(tokenizer)} ends an assistant's turn with "
                f"{tail!r}, which does not start with a special token: {_REMEDY}"
            )
        eos: int | None = getattr(tokenizer, "eos_token_id", None)
        self.stop_ids: Ids = (*first,) if eos is None or eos in first else (*first, eos)
        self._encode_cached = functools.lru_cache(_CACHED)(self._text.encode)
        self._decode_cached = functools.lru_cache(_CACHED)(self._decode)

    @classmethod
    def load(cls, path: str) -> Chat:
        """The chat of the model in directory `path`, or of the base that ships with rayrl.

        Raises:
            ConfigError: no tokenizer there, or one that cannot be used.
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
        """Ids of a new conversation, up to where the model is to answer.

        Args:
            messages: everything said so far.
            tools: JSON schemas of the functions the model may call; if the template does not tell
                of them as `chat.tools` hears calls, they are described in the first message, and
                results are a user's messages.
        """
        messages = self._fitting(self._as_shown(messages))
        if tools:
            if self.speaks_tools:
                return self._with_template_tools(messages, tools)
            messages = introduce(messages, describe(tools))
        roles = tuple(message.role for message in messages)
        pieces = self._pieces.get(("start", roles))
        if pieces is None:
            pieces = self._find_start(roles)
        return self.encode(self._weave(pieces, messages))

    def extend(
        self,
        messages: Sequence[Message],
        last_ids_finished: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Ids:
        """Ids to append after a completion: end of turn if it lacks it, messages, next header.

        Args:
            messages: what is said next.
            last_ids_finished: whether the completion ended with `stop_ids[0]`. A truncated one gets
                it here, as part of the next prompt, so that it is not trained on.
            tools: functions offered only from now on; they are described in the first message.
        """
        messages = self._fitting(self._as_shown(messages), ("user", "assistant"))
        if tools:
            messages = introduce(messages, describe(tools))
        roles = tuple(message.role for message in messages)
        pieces = self._pieces.get(("extend", roles))
        if pieces is None:
            pieces = self._find_extension(roles)
        ids = self.encode(self._weave(pieces, messages))
        return ids[1:] if last_ids_finished else ids

    def encode(self, text: str) -> Ids:
        """Ids of a text by itself: control tokens written in it are split into text."""
        return self._encode_cached(text) if len(text) <= _CACHED_LENGTH else self._text.encode(text)

    def fewest(self, texts: Iterable[str]) -> int:
        """How many ids these contents have at least, by their length alone; 0 if that says nothing.

        It is for refusing what is far too long without tokenizing it.
        """
        if not self._longest:
            return 0
        size = sum(len(text.strip() if self._trims else text) for text in texts)
        return -(-size // self._longest)

    def reply(self, text: str) -> Ids:
        """Ids of a model's whole reply, end of turn included: what supervised training wants."""
        text = self._own(text)
        if self._depends:
            for lead in self._leads:
                before, whole = self.encode(lead), self.encode(lead + text)
                if whole[: len(before)] == before:
                    return (*whole[len(before) :], self.stop_ids[0])
        return (*self.encode(text), self.stop_ids[0])

    def render(self, turns: Sequence[Turn]) -> tuple[Ids, tuple[bool, ...]]:
        """One conversation of a player without ids (a teacher), as if a model had played it.

        Args:
            turns: turns of one seat and one conversation, in order.

        Returns:
            ids (T,) of the whole conversation, and (T,) True where a reply stands.
        """
        ids: list[int] = []
        is_reply: list[bool] = []
        told: set[str] = set()
        for turn in turns:
            tools = untold(turn.tools, told)
            told.update(map(tool_name, tools))
            prompt = (
                self.extend(turn.prompt, True, tools) if ids else self.start(turn.prompt, tools)
            )
            reply = self.reply(turn.text)
            ids += prompt + reply
            is_reply += [False] * len(prompt) + [True] * len(reply)
        return tuple(ids), tuple(is_reply)

    def text(self, ids: Sequence[int]) -> str:
        """A completion as text, without the id that ended it."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        kept = tuple(ids[:end])
        return self._decode_cached(kept) if end <= _CACHED_LENGTH else self._decode(kept)

    def _fitting(
        self, messages: Sequence[Message], before: tuple[str, ...] = ()
    ) -> Sequence[Message]:
        """The messages, folded where the template refuses their roles after those of `before`."""
        roles = (*before, *[message.role for message in messages])
        if roles not in self._fits:
            takes = self._takes(roles)
            if len(roles) > _CACHED_MESSAGES:
                return messages if takes else fold(messages)
            if len(self._fits) >= _CACHED:  # as in `_keep`
                self._fits.clear()
            self._fits[roles] = takes
        return messages if self._fits[roles] else fold(messages)

    def _takes(self, roles: Sequence[str]) -> bool:
        try:
            text = self._template(roles)
        except ConfigError:
            return False
        return "system" not in roles or _sentinel(roles.index("system")) in text

    def document(self, text: str) -> Ids:
        """Ids of a text by itself: no roles, but what the tokenizer puts before every text."""
        begin: int | None = getattr(self.tokenizer, "bos_token_id", None)
        opening = list(self._control.encode("", add_special_tokens=True).ids)
        return (*(opening[:1] if opening[:1] == [begin] else ()), *self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Any ids as text, control tokens as they are written."""
        return self._decode(tuple(ids))

    def bytes_of(self, one: int) -> bytes:
        """What one id writes: it may be a part of a character."""
        token = str(self._control.id_to_token(one))
        if one not in self._control.get_added_tokens_decoder() and self._bytes:
            with contextlib.suppress(KeyError):
                return bytes(self._bytes[character] for character in token)
        return self._decode((one,)).encode()

    def _keep(self, key: tuple[Any, ...], pieces: tuple[str, ...]) -> tuple[str, ...]:
        if len(pieces) > _CACHED_MESSAGES:
            return pieces
        if len(self._pieces) >= _CACHED:  # a server's clients choose the keys
            self._pieces.clear()
        self._pieces[key] = pieces
        return pieces

    def _weave(self, pieces: tuple[str, ...], messages: Sequence[Message]) -> str:
        parts = [pieces[0]]
        for message, piece in zip(messages, pieces[1:], strict=True):
            content = message.content.strip() if self._trims else message.content
            parts += (self._own(content) if message.role == "assistant" else content, piece)
        return "".join(parts)

    def _own(self, text: str) -> str:
        """A model's own words, in which the marks of calls may be tokens."""
        for mark, name in self._marks:
            text = text.replace(mark, name)
        return text

    def _decode(self, ids: Ids) -> str:
        return str(self._control.decode(ids, skip_special_tokens=False))

    # ---- what the template is made of

    def _template(
        self,
        roles: Sequence[str],
        tools: Sequence[Mapping[str, Any]] | None = None,
        first: int = 0,
        pad: str = "",
    ) -> str:
        """The template with sentinel number `first + k` as the content of message k."""
        for role in roles:  # it is the template's to write, so it must not be anybody's text
            if role not in get_args(Role):
                raise ConfigError(f"role {role!r}: must be one of {', '.join(get_args(Role))}")
        contents = [f"{pad}{_sentinel(first + k)}{pad}" for k in range(len(roles))]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            raise ConfigError(
                f"the chat template of {name_of(self.tokenizer)} cannot render messages by "
                f"{', '.join(roles)}: {error}. Send other roles or {_REMEDY}"
            ) from error
        return str(text)

    def _probe(self) -> str:
        """What follows an assistant's content; notes whether the template trims contents."""
        padded = self._template(["user"], pad="  ")
        self._trims = f"  {_sentinel(0)}  " not in padded
        return self._cut(self._after_reply(["user"]), range(2, 3))[0]

    def _text_tokenizer(self, tail: str) -> TextTokenizer:
        """The tokenizer for which what the template is made of is mere text.

        Some models write `<tool_call>` as one token, which nobody else's text may become.
        """
        turns = tail + self._template(["user"])
        with contextlib.suppress(ConfigError):  # a template without system messages
            turns += self._template(["system", "user"])
        tokenizer, talk = self.tokenizer, self._tool_talk
        unknown, ends = tokenizer.unk_token, (tokenizer.bos_token, tokenizer.eos_token)
        control = control_ids(self._control, turns, talk, tail)
        written = {self._control.id_to_token(one) for one in control}
        reserved = {one for one in written if one in turns + talk or one in ends}
        reserved |= written.intersection(tokenizer.all_special_tokens) - {unknown}
        text = TextTokenizer(self._control, control, reserved)
        ids = map(self._control.token_to_id, CALL_MARKS)
        marks = zip(CALL_MARKS, map(text.names.get, ids), strict=True)
        self._marks = [(mark, name) for mark, name in marks if name is not None]
        return text

    @functools.cached_property
    def _leads(self) -> tuple[str, str, str]:
        """What a reply may follow: what does, or if it would become one with that, other text."""
        end = self._text.names[self.stop_ids[0]]
        after = self._text.named(self._after_reply(["user"]))
        return "x".join(self._cut(after, range(2, 3))), end + "\n", end + "x"

    @functools.cached_property
    def _depends(self) -> bool:
        """Whether a reply has other ids by itself: some tokenizers begin a text with a space."""
        lead = self._leads[0]
        return self.encode(lead + "x") != self.encode(lead) + self.encode("x")

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether the template opens a thought, so that a reply begins within it."""
        header = self._cut(self._after_reply(["user"]), range(2, 3))[-1]
        opened, ended = map(header.rfind, THOUGHT_MARKS)
        return opened > ended

    def _find_start(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        text = self._text.named(self._template(roles))
        return self._keep(("start", roles), self._cut(text, range(len(roles))))

    def _find_extension(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        text = self._text.named(self._after_reply(roles))
        return self._keep(("extend", roles), self._cut(text, range(2, 2 + len(roles))))

    def _after_reply(self, roles: Sequence[str]) -> str:
        """What the template writes after an assistant's reply, with messages by `roles`."""
        before = self._template(["user"])
        whole = self._template(["user", "assistant", *roles])
        # what a template puts before the reply may differ: the model read what stood there then
        shown, found, after = whole.partition(_sentinel(1))
        if not found or shown.partition(_sentinel(0))[:2] != before.partition(_sentinel(0))[:2]:
            raise ConfigError(
                f"the chat template of {name_of(self.tokenizer)} rewrites earlier messages, so ids "
                f"cannot be appended: it renders {shown!r} where {before!r} stood "
                f"when the model answered; {_REMEDY}"
            )
        return after[len(gap(after, self.tokenizer)) :]

    def _cut(self, text: str, sentinels: range) -> tuple[str, ...]:
        """A template's text, cut at the contents of messages."""
        pieces = _SENTINEL.split(text)  # and the numbers between them
        if pieces[1::2] != [str(index) for index in sentinels]:
            raise ConfigError(
                f"the chat template of {name_of(self.tokenizer)} does not show every message "
                f"exactly once and in order: {_REMEDY}"
            )
        return tuple(pieces[::2])

    # ---- tools

    @functools.cached_property
    def _tool_talk(self) -> str:
        """A talk with a tool as the template writes it; empty if it refuses or lists no tools."""
        talk = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
            {"role": "tool", "content": "t", "tool_call_id": "call_0", "name": "PROBETOOL"},
        ]
        try:
            listed = "PROBETOOL" in self._template(["user"], tools=[_PROBE])
            self._template(["user", "assistant", "tool"])
            text = self.tokenizer.apply_chat_template(talk, tools=[_PROBE], tokenize=False)
        except Exception:  # templates raise what they like about messages that they do not know
            return ""
        return str(text) if listed else ""

    @functools.cached_property
    def speaks_tools(self) -> bool:
        """Whether the template writes calls as they are parsed here."""
        return ParsedCall("PROBETOOL", {"x": 1}) in parse_calls(self._tool_talk)

    def _as_shown(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Without the role `tool` where the template knows nothing of it."""
        if all(message.role != "tool" for message in messages) or self.speaks_tools:
            return messages
        return as_user_messages(messages)

    def _with_template_tools(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Ids:
        roles = tuple(message.role for message in messages)
        key = ("start", roles, json.dumps(list(tools)))
        pieces = self._pieces.get(key)
        if pieces is None:
            text = self._template(roles, list(tools))
            self._check_listing(text, roles, tools)
            pieces = self._cut(self._text.named(text), range(len(roles)))
            if len(key[-1]) <= _CACHED_LISTING:
                self._keep(key, pieces)
        return self.encode(self._weave(pieces, messages))

    def _check_listing(
        self, text: str, roles: Sequence[str], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse tools of which the template's text gets control tokens that are not its own.

        Their words are not contents: a template may escape, change or join them as it likes. So its
        text is compared with what it writes of the same tools without their punctuation.
        """
        marks = [self._control.id_to_token(one) for one in self._text.control]
        own = self._text.controls_in(self._template(roles, without_marks(list(tools), marks)))
        found = self._text.controls_in(text)
        if found != own:
            more = Counter(found) - Counter(own)
            token = self._control.id_to_token(next(iter(more), found[0] if found else own[0]))
            raise ConfigError(f"a tool's description contains {token!r}: remove it")
