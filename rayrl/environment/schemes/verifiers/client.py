"""The client that environments of verifiers ask for replies."""

from __future__ import annotations

import operator
from typing import Any

import verifiers as vf
from verifiers.clients import Client
from verifiers.types import Response, ResponseMessage, ToolCall, Usage
from verifiers.utils.message_utils import normalize_messages

__all__ = ["AgentClient"]


class AgentClient(Client):  # type: ignore[misc]
    """What verifiers asks for replies: a rayrl agent."""

    def __init__(self, agent: Any) -> None:
        super().__init__(None)
        self._agent = agent
        self._tools: Any = None
        self._schemas: list[dict[str, Any]] = []
        self._heard: list[Any] = []  # messages of the last prompt
        self._contents: list[Any] = []  # theirs
        self._said: Any = None  # the answer

    async def get_response(
        self,
        prompt: Any,
        model: str,
        sampling_args: Any,
        tools: Any = None,
        **_: Any,
    ) -> Response:
        """The agent's reply to all messages so far; the sampling arguments are the run's."""
        if tools is not self._tools:
            self._tools, self._schemas = tools, [_schema(tool) for tool in tools or ()]
        answer = await self._answer(prompt)
        turn = answer.turn
        if turn.finish == "length" and not turn.text:
            raise vf.OverlongPromptError("the conversation has no room for a reply")
        calls = [ToolCall(id=one["id"], **one["function"]) for one in answer.get("tool_calls", ())]
        asked, said = len(turn.prompt_ids), len(turn.completion_ids)
        message = ResponseMessage(
            content=answer["content"],
            tool_calls=calls or None,
            finish_reason="tool_calls" if calls else turn.finish,
            is_truncated=turn.finish == "length",
        )
        usage = Usage(
            prompt_tokens=asked,
            reasoning_tokens=0,
            completion_tokens=said,
            total_tokens=asked + said,
        )
        return Response(id="rayrl", created=0, model=model, usage=usage, message=message)

    async def _answer(self, prompt: Any) -> Any:
        """Ask the agent. Mostly a prompt is the last one, its answer and something new."""
        new, after, heard, said = prompt, self._said, self._heard, self._contents
        k = len(heard)
        if (
            after is not None
            and len(prompt) > k + 1
            and all(map(operator.is_, prompt, heard))
            and all(one.content is content for one, content in zip(prompt, said, strict=False))
            and _message(prompt[k]) == after
        ):
            new = prompt[k + 1 :]
            heard.append(prompt[k])
            said.append(prompt[k].content)
        else:
            after, heard, said = None, [], []
        if any(isinstance(one, dict) for one in new):
            new = normalize_messages(new)
        self._said = None  # while it waits, and if it fails
        answer = await self._agent.respond(
            [_message(one) for one in new], self._schemas, after=after
        )
        heard += new
        # what else a content is could be changed in place: then all is read again
        said += [one.content if isinstance(one.content, str | None) else self for one in new]
        self._said, self._heard, self._contents = answer, heard, said
        return answer

    def setup_client(self, config: Any) -> None:
        """Nothing is to be connected."""

    async def to_native_tool(self, tool: Any) -> Any:
        """A tool in OpenAI's format."""
        return _schema(tool)

    async def to_native_prompt(self, messages: Any) -> Any:
        """Not used by `get_response`."""
        return messages, {}

    async def get_native_response(self, *_: Any, **__: Any) -> Any:
        """Not used by `get_response`."""
        raise NotImplementedError

    async def raise_from_native_response(self, response: Any) -> None:
        """Not used by `get_response`."""

    async def from_native_response(self, response: Any) -> Any:
        """Not used by `get_response`."""
        return response

    async def close(self) -> None:
        """Nothing is to be closed."""


def _schema(tool: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        },
    }


def _message(message: Any) -> dict[str, Any]:
    """A message of verifiers in OpenAI's format."""
    role, content = message.role, message.content
    if isinstance(content, list):
        content = [part if isinstance(part, dict) else part.model_dump() for part in content]
    plain = {"role": "user" if role == "text" else role, "content": content}
    if role == "tool":
        plain["tool_call_id"] = message.tool_call_id
    elif role == "assistant" and message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return plain
