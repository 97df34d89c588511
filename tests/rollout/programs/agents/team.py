"""A lead, two workers at once, of two requests each, and a compaction; on the standard library."""

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    kill_once()
    return reply["content"]


answered, lock = [0], threading.Lock()


def kill_once() -> None:
    """If TEAM_KILLED names a folder, kill the env worker: see `team` in cluster_envs.py."""
    with lock:
        answered[0] += 1
        if folder := os.environ.get("TEAM_KILLED"):
            died = os.listdir(folder)
            if len(died) == answered[0] - 1 and str(task["seed"]) not in died:
                (Path(folder) / str(task["seed"])).touch()
                os.kill(os.getppid(), signal.SIGKILL)


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
