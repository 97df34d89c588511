"""A harness that only talks, without a program of its own: verifiers' contract is the endpoint."""

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire


class Talk(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        if isinstance(data.prompt, str):
            messages = [{"role": "user", "content": data.prompt}]
        else:
            messages = [message_to_wire(one) for one in data.prompt or ()]
        if data.system_prompt:
            messages.insert(0, {"role": "system", "content": data.system_prompt})
        async with httpx.AsyncClient(verify=False, timeout=None) as client:
            answer = await client.post(
                f"{endpoint}/chat/completions",
                headers={"Authorization": f"Bearer {secret}"},
                json={"model": ctx.model, "messages": messages},
            )
        return vf.ProgramResult(exit_code=int(answer.is_error), stdout="", stderr=answer.text)


__all__ = ["Talk"]
