"""What the tests of the act half share: a real tokenizer, and generators without a model."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from rayrl.chat.renderer import Chat
from rayrl.errors import InfraError
from rayrl.rollout.agent import Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer
from rayrl.rollout.rollout import play_groups
from rayrl.types import Completion, Group, Message, Request, Sampling, Turn, VersionSpan

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the template of Hermes and Qwen models, but for their words
HERMES = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Use\n<tools>{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}\n</tools>\nTo call:\n"
    '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n'
    "{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "Your turn. Choose a position: 0 1 2 3 4 5 6 7 8",
    "<think>I take the centre</think><move>4</move>",
    "user assistant system tool",
] * 5


def build_tokenizer(
    template: str = CHATML,
    special: bool = True,
    control: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    eos: str = "<|im_end|>",
    words: Sequence[str] = (),
) -> Any:
    """A byte-level BPE trained on the spot: control tokens, and added `words` that are none."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    backend.add_tokens([AddedToken(token, special=special) for token in control])
    backend.add_tokens([AddedToken(word, special=False) for word in words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def chat() -> Chat:
    return Chat(build_tokenizer())


class Instant:
    """Answers at once with texts drawn from the request's seed; keeps the requests."""

    def __init__(self, chat: Chat, texts: Sequence[str], version: int = 3) -> None:
        self.replies = [chat.reply(text) for text in texts]
        self.version = version
        self.requests: list[Request] = []
        self.released: list[str] = []

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        ids = self.replies[random.Random(request.seed).randrange(len(self.replies))]
        ids = ids[: request.sampling.max_tokens]
        finish = "stop" if ids[-1] in request.stop_ids else "length"
        spans = (VersionSpan(self.version, 0, len(ids)),)
        return Completion(ids, (-0.5,) * len(ids), spans, finish)

    def release(self, sessions: Sequence[str]) -> None:
        self.released += sessions


class InTurn:
    """Answers the requests with one text after the other, as long as they may be."""

    def __init__(self, chat: Chat, *texts: str) -> None:
        self.replies = [chat.reply(text) for text in texts]
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Completion:
        ids = self.replies[len(self.requests)][: request.sampling.max_tokens]
        self.requests.append(request)
        finish = "stop" if ids[-1] in request.stop_ids else "length"
        return Completion(ids, (-0.5,) * len(ids), (VersionSpan(0, 0, len(ids)),), finish)


class Flaky:
    """A player that fails its first `fails` answers, then says yes."""

    trainable = True

    def __init__(self, fails: int, error: Exception | None = None) -> None:
        self.left = fails
        self.error = error or InfraError("replica died")
        self.sessions: list[str] = []
        self.seeds: list[int] = []

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        self.sessions.append(conversation.session)
        self.seeds.append(options.seed)
        if self.left:
            self.left -= 1
            raise self.error
        return Turn("agent", tuple(new), "yes", "stop")


def says(text: str = "yes") -> dict[str, Any]:
    """Players of an episode whose one seat always says the same."""
    return {"agent": ScriptedPlayer(lambda messages, rng: text)}


def instant(**keywords: Any) -> dict[str, Any]:
    """Players of an episode whose one seat is a policy that answers at once."""
    engine = Instant(chat(), ["one", "the lazy dog", "three"])
    return {"agent": PolicyPlayer(chat(), engine, Sampling(), **keywords)}


async def collect(*args: Any, **keywords: Any) -> list[Group]:
    """All groups of `play_groups`."""
    return [group async for group in play_groups(*args, **keywords)]
