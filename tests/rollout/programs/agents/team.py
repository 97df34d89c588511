"""A lead, two workers at once, of two requests each, and a compaction; on the standard library."""

import json
import os
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

task = json.load(sys.stdin)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(messages: list, text: str) -> str:
    messages.append({"role": "user", "content": text})
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "policy", "messages": messages}).encode(),
        {
            "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
            "Content-Type": "application/json",
        },
    )
    reply = json.load(opener.open(request))["choices"][0]["message"]
    messages.append(reply)
    return reply["content"]


def work(number: int) -> str:
    messages = [{"role": "system", "content": f"You are worker {number}."}]
    time.sleep(task.get("late", [0, 0])[number])
    ask(messages, "The first half?")
    return ask(messages, "The second half?")


lead = [{"role": "system", "content": "You lead."}]
ask(lead, f"How do you add {task['a']} and {task['b']}?")
with ThreadPoolExecutor() as pool:
    found = list(pool.map(work, range(2)))
plan = ask(lead, "They say: " + "; ".join(found))
print(ask([lead[0]], f"Notes: {plan}. The answer?"))
