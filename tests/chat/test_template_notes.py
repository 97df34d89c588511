"""Notes on chat templates that imitate the peculiarities of common model families."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rayrl import loop
from rayrl.chat.renderer import Chat
from rayrl.chat.template_notes import describe_template
from rayrl.chat.tokenizer import fold, render
from rayrl.cli import main
from rayrl.config import from_dict
from rayrl.errors import RunFailed
from rayrl.run import training as run_training
from rayrl.run.stage import POLICY, log_template_notes
from rayrl.types import Message, Turn, assistant, system, user
from tests.act import CHATML, HERMES, build_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {}},
    },
}
# drops thoughts from all but the newest round; reads tools, calls and results (Qwen3)
QWEN = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}{% for call in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# opens the thought itself and drops it later; no turn headers but two special tokens (DeepSeek R1)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# refuses system messages, requires alternating roles, strips contents, own end of turn (Gemma)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
# brackets with spaces around contents, the system message inside the first user's (Llama 2)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rule = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rule = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and rule %}<<{{ rule }}>> "
    "{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# the system message goes before the last user's (Mistral)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set rule = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rule = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and rule %}{{ rule }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# a header with today's date (Llama 3)
LLAMA3 = (
    "{{ bos_token }}<start>system<end>Today: {{ strftime_now('%d %b %Y') }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}<eot>"
    "{% for m in rest %}<start>{{ m.role }}<end>{{ m.content }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant<end>{% endif %}"
)
# the template of SmolLM2-135M-Instruct, unchanged
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset what has been logged, as in a new process."""
    monkeypatch.setattr("rayrl.run.stage._said", set())


def chat_of(template: str, *control: str, eos: str = "", bos: str = "") -> Chat:
    words = control or ("<|im_start|>", "<|im_end|>")
    tokenizer = build_tokenizer(template, control=words, eos=eos or words[-1])
    if bos:
        tokenizer.bos_token = bos
    return Chat(tokenizer)


def chat_with_bos(template: str, *control: str, bos: str, eos: str) -> Chat:
    """A tokenizer that puts `bos` before every text."""
    from tokenizers import processors

    tokenizer = build_tokenizer(template, control=control, eos=eos)
    tokenizer.bos_token = bos
    token_id = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, token_id)]
    )
    return Chat(tokenizer)


def qwen() -> Chat:
    return chat_of(QWEN)


def deepseek() -> Chat:
    return chat_of(DEEPSEEK, "<|bos|>", "<|User|>", "<|Assistant|>", "<|eos|>", bos="<|bos|>")


def gemma() -> Chat:
    control = ("<bos>", "<start>", "<end>", "<eos>")
    return chat_with_bos(GEMMA, *control, bos="<bos>", eos="<eos>")


def llama2() -> Chat:
    return chat_of(LLAMA2, "<s>", "</s>", bos="<s>")


def appended(chat: Chat, *messages: str | Message | Sequence[Message]) -> str:
    """Decode a conversation built by appending, alternately, messages and replies."""
    ids: tuple[int, ...] = ()
    for index, item in enumerate(messages):
        if index % 2:
            assert isinstance(item, str)
            ids += chat.reply(item)
            continue
        if isinstance(item, str):
            item = user(item)
        new = [item] if isinstance(item, Message) else item
        ids += chat.extend(new, True) if ids else chat.start(new)
    return str(chat.tokenizer.decode(ids))


def control(chat: Chat, *tokens: str) -> list[int]:
    return list(chat.tokenizer.convert_tokens_to_ids(list(tokens)))


THOUGHT = "<think>\nI take it\n</think>\n\nyes"


def test_a_template_that_only_appends_has_no_notes() -> None:
    assert describe_template(chat_of(HERMES)) == []
    assert describe_template(chat_of(CHATML)) == [
        "it does not support tools; rayrl describes them in the first message"
    ]


def test_another_format_of_tool_calls() -> None:
    own = "<|im_start|>system\nOwn rule.<|im_end|>\n"
    begins = "{% if not tools and messages[0].role != 'system' %}" + own + "{% endif %}"
    other = HERMES.replace('<tool_call>\n{"name": "{{', '[TOOL_CALLS] {"name": "{{')
    assert other != HERMES
    form = "it has its own format of tool calls; rayrl describes them in the first message"
    assert describe_template(chat_of(other)) == [form]
    left = "with tools it leaves that system message out; rayrl does so too"
    assert left in describe_template(chat_of(begins + HERMES))
    told = chat_of(begins + other)
    assert left not in describe_template(told)
    assert form in describe_template(told)
    assert "Own rule." in str(told.tokenizer.decode(told.start([user("u")], [TOOL])))


def test_thoughts_dropped_from_history_are_kept() -> None:
    chat = qwen()
    (found,) = describe_template(chat)
    assert found == (
        "it drops earlier <think> blocks when a conversation is rendered again; rayrl keeps "
        "them, because it trains on exactly the ids that were sampled"
    )
    text = appended(chat, "one", THOUGHT, "two", "no", "three")
    assert text == (
        f"<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n{THOUGHT}<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    again = render(chat.tokenizer, [user("one"), assistant(THOUGHT), user("two")])
    assert again is not None
    assert "I take it" not in again


def test_a_thought_opened_by_the_template() -> None:
    chat = deepseek()
    opens, leaves_out, drops = describe_template(chat)[:3]
    assert "a reply begins inside it" in opens
    assert r"asks for a reply with '<think>\n' and leaves that out" in leaves_out
    assert "drops earlier <think> blocks" in drops
    text = appended(chat, [system("s"), user("one")], "hm\n</think>\n\nyes", "two")
    assert text == (
        "<|bos|>s<|User|>one<|Assistant|><think>\nhm\n</think>\n\nyes<|eos|>"
        "<|User|>two<|Assistant|><think>\n"
    )
    # appended ids: end of turn, header, content, header
    assert list(chat.extend([user("two")], False)) == [
        *control(chat, "<|eos|>", "<|User|>"),
        *chat.encode("two"),
        *control(chat, "<|Assistant|>"),
        *chat.encode("<think>\n"),
    ]
    assert chat.extend([user("two")], False)[1:] == chat.extend([user("two")], True)


def test_refused_roles_are_folded() -> None:
    chat = gemma()
    assert [note.split("; ")[0] for note in describe_template(chat)] == [
        "it refuses system messages",
        "it refuses two messages of the same role in a row",
        "it strips white space around messages",
        "it strips white space around earlier replies when a conversation is rendered again",
        "it begins with '<bos>', as the tokenizer does with every text",
        "it ends a turn with '<end>', but the tokenizer's end of text is '<eos>'",
        "it does not support tools",
    ]
    text = appended(chat, [system("be brief"), user("one ")], " yes", [user("two"), user("three")])
    assert text == (
        "<bos><start>user\nbe brief\n\none<end>\n<start>model\n yes<end>\n"
        "<start>user\ntwo\n\nthree<end>\n<start>model\n"
    )
    end, eos = control(chat, "<end>", "<eos>")
    assert chat.stop_ids == (end, eos)
    assert chat.extend([user("two")], False)[0] == end  # after a reply that ended with <eos>
    # a teacher's turns give the same ids
    turns = [
        Turn("agent", (system("be brief"), user("one")), "yes", "stop"),
        Turn("agent", (user("two"),), "no", "stop"),
    ]
    ids, _ = chat.render(turns)
    assert chat.tokenizer.decode(ids) == (
        "<bos><start>user\nbe brief\n\none<end>\n<start>model\nyes<end>\n"
        "<start>user\ntwo<end>\n<start>model\nno<end>"
    )


def test_spaces_before_the_end_of_turn_are_left_out() -> None:
    chat = llama2()
    found = describe_template(chat)
    assert "it writes ' ' between a reply and its end of turn; rayrl does not" in found
    assert any("writes ' ' before earlier replies" in note for note in found)
    assert chat.stop_ids == tuple(control(chat, "</s>"))
    assert appended(chat, [system("rule"), user("one")], "yes", "two") == (
        "<s>[INST] <<rule>> one [/INST]yes</s><s>[INST] two [/INST]"
    )


def test_a_system_message_that_moves() -> None:
    chat = chat_of(MISTRAL, "<s>", "</s>", bos="<s>")
    assert any(
        "moves the system message to the last user message" in note
        for note in describe_template(chat)
    )
    assert appended(chat, [system("rule"), user("one")], "yes", "two") == (
        "<s>[INST]rule\n\none[/INST]yes</s>[INST]two[/INST]"
    )


def test_a_date_changes_the_ids_from_day_to_day() -> None:
    chat = chat_of(LLAMA3, "<s>", "<start>", "<end>", "<eot>", bos="<s>")
    (dated,) = [note for note in describe_template(chat) if "date" in note]
    assert "the same task has different ids tomorrow" in dated
    day = time.strftime("%d %b %Y")
    assert appended(chat, "one", "yes", "two") == (
        f"<s><start>system<end>Today: {day}\n<eot><start>user<end>one<eot>"
        "<start>assistant<end>yes<eot><start>user<end>two<eot><start>assistant<end>"
    )


def test_smollm2() -> None:
    tokenizer = build_tokenizer(SMOLLM2)
    tokenizer.bos_token = "<|im_start|>"
    chat = Chat(tokenizer)
    first, second = describe_template(chat)
    assert "a system message of its own if none is given ('You are a helpful AI" in first
    assert "does not support tools" in second
    opening = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    )
    following = "yes<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert appended(chat, "one") == opening
    assert appended(chat, "one", "yes", "two") == opening + following  # only once
    assert "SmolLM" not in appended(chat, [system("s"), user("one")])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML.replace("{% for", "{{ bos_token + bos_token }}{% for", 1), "'<|s|>' twice"),
        (CHATML, "begins every text with '<|s|>', the template does not"),
    ],
)
def test_bos_twice_or_missing(template: str, expected: str) -> None:
    control = ("<|s|>", "<|im_start|>", "<|im_end|>")
    chat = chat_with_bos(template, *control, bos="<|s|>", eos="<|im_end|>")
    assert any(expected in note for note in describe_template(chat))


def test_other_differences_are_quoted() -> None:
    chat = chat_of(CHATML.replace("{{ m['content'] }}", "{{ loop.index }}: {{ m['content'] }}"))
    found, *_ = describe_template(chat)
    assert "before earlier replies" in found
    users = "{{ loop.index if m['role'] == 'user' }}: {{ m['content'] }}"
    chat = chat_of(CHATML.replace("{{ m['content'] }}", users.replace(": ", "")))
    (found, _) = describe_template(chat)
    assert found.startswith("rendered again, a conversation reads '5RAYRL")
    assert "where rayrl appended '3RAYRL" in found


def test_fold() -> None:
    messages = [system("a"), system("b"), user("c"), assistant("d"), user("e"), user("f")]
    assert fold(messages) == [user("a\n\nb\n\nc"), assistant("d"), user("e\n\nf")]


def saved(template: str, folder: Path) -> str:
    chat = chat_of(template)
    chat.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    return str(folder)


def test_notes_are_logged_before_rollouts_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen = saved(QWEN, tmp_path / "qwen")
    config = from_dict({"model": {"path": qwen}})
    log_template_notes(
        config, ["player:random", "model:" + saved(CHATML, tmp_path / "plain"), POLICY]
    )
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"chat template of {tmp_path / 'plain'}: it does not support tools")
    assert second.startswith(f"chat template of {qwen}: it drops earlier <think> blocks")
    log_template_notes(from_dict({}))  # the embedded base only appends
    assert capsys.readouterr().err == ""


def test_plan_shows_the_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "env=copyword", f"model={saved(QWEN, tmp_path)}"])
    out = capsys.readouterr().out
    assert f"Chat templates\n  - chat template of {tmp_path}: it drops earlier <think>" in out
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["plan", "env=copyword", f"model={tmp_path}"]) == 1
    assert "the chat template of" in capsys.readouterr().out


def test_plan_shows_the_notes_of_frozen_opponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = saved(QWEN, tmp_path)
    main(["plan", "env=tictactoe_versus", f"env.seats.o=model:{frozen}"])
    assert f"chat template of {frozen}: it drops earlier" in capsys.readouterr().out


def test_recipe_stages_log_a_note_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("sft", "rl1"):
        log_template_notes(from_dict({"model": {"path": saved(QWEN, tmp_path / stage)}}))
    said = capsys.readouterr().err
    assert said.count("it drops earlier") == 1
    assert str(tmp_path / "sft") in said


async def test_training_logs_the_notes_of_frozen_opponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cluster(*_: object) -> None:
        raise RunFailed("no cluster here")

    monkeypatch.setattr(run_training, "open_cluster", no_cluster)
    frozen = saved(QWEN, tmp_path / "frozen")
    seats = {"o": f"model:{frozen}"}
    env = {"name": "tictactoe_versus", "seats": seats}
    with pytest.raises(RunFailed, match="no cluster here"):
        await loop.train(from_dict({"env": env, "run": {"dir": str(tmp_path / "run")}}))
    assert f"chat template of {frozen}: it drops earlier" in capsys.readouterr().err
