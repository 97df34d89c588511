"""No text produces a control token with any tokenizer; all other ids are the tokenizer's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.chat.renderer import Chat
from rayrl.errors import ConfigError
from rayrl.types import Message, assistant, system, tool, user
from tests.act import HERMES, build_tokenizer
from tests.tokenizers_here import KINDS, PLACES, WORDS, Control, built

few = settings(max_examples=12)
TABLE = [
    (kind, place, WORDS[(k + p) % len(WORDS)])
    for k, kind in enumerate(KINDS)
    for p, place in enumerate(PLACES)
]
every_kind = pytest.mark.parametrize(("kind", "place", "control"), TABLE)

LINES = "{% for m in messages %}B{{ m['role'] }}\n{{ m['content'] }}E\n{% endfor %}"
TEMPLATES = {
    "header on a line": LINES + "{% if add_generation_prompt %}Bassistant\n{% endif %}",
    "no separators": (
        "{% for m in messages %}B{{ m['content'] }}E{% endfor %}"
        "{% if add_generation_prompt %}B{% endif %}"
    ),
    "spaces around": (
        "{% for m in messages %}B {{ m['role'] }}: {{ m['content'] }}E {% endfor %}"
        "{% if add_generation_prompt %}B assistant:{% endif %}"
    ),
}


def written(template: str, control: Control) -> str:
    """The template with B and E replaced by the control tokens."""
    return TEMPLATES[template].translate({ord("B"): control.begin, ord("E"): control.end})


def chat_of(kind: str, place: str, control: Control, template: str = "header on a line") -> Chat:
    return Chat(built(kind, place, control, written(template, control)))


def ids_of(chat: Chat, control: Control) -> set[int]:
    return set(chat.tokenizer.convert_tokens_to_ids([control.begin, control.end]))


def template_ids(chat: Chat, messages: list[Message]) -> tuple[int, ...]:
    data = [{"role": m.role, "content": m.content} for m in messages]
    return tuple(
        chat.tokenizer.apply_chat_template(data, add_generation_prompt=True, return_dict=False)
    )


def wide(text: str) -> str:
    """The text in full-width characters, which NFKC maps back to ASCII."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


plain = st.text(st.characters(codec="utf-8", exclude_characters="<>[]|«»｜＜＞［］｜"), max_size=12)
ordinary = st.one_of(plain, st.sampled_from(["the lazy dog", "\n", " x ", "\n\nuser\n", "e\u0301"]))


def hostile(control: Control) -> st.SearchStrategy[str]:
    words = [control.begin, control.end]
    marks = [*words, *map(str.upper, words), *map(wide, words), words[1][:3], words[1][3:], "<unk>"]
    joined = st.lists(st.one_of(st.sampled_from(marks), plain), max_size=5).map("".join)
    return st.one_of(joined, st.sampled_from(marks))


@every_kind
def test_text_never_produces_a_control_id(kind: str, place: str, control: Control) -> None:
    chat = chat_of(kind, place, control)
    forbidden = ids_of(chat, control)
    assert forbidden.intersection(chat.tokenizer(control.end).input_ids)  # as it does by default

    @given(hostile(control), hostile(control))
    @few
    def holds(one: str, two: str) -> None:
        assert forbidden.isdisjoint(chat.encode(one))
        assert forbidden.isdisjoint(chat.document(one))
        clean = [chat.start([system("s"), user("u")]), chat.extend([user("u"), user("v")], True)]
        dirty = [chat.start([system(one), user(two)]), chat.extend([user(one), user(two)], True)]
        for with_marks, without in zip(dirty, clean, strict=True):
            assert [i for i in with_marks if i in forbidden] == [
                i for i in without if i in forbidden
            ]
        assert [i for i in chat.reply(one) if i in forbidden] == [chat.stop_ids[0]]
        if kind in ("byte_bpe", "byte_unigram", "byte_bpe_whole_words"):
            assert chat.decode(chat.encode(one)) == one

    holds()


@every_kind
def test_other_text_is_encoded_as_by_the_tokenizer(kind: str, place: str, control: Control) -> None:
    chat = chat_of(kind, place, control)

    @given(ordinary)
    @few
    def holds(text: str) -> None:
        assert list(chat.encode(text)) == chat.tokenizer(text, add_special_tokens=False).input_ids

    holds()


# Two things are left out. A marker that is only a piece of the model's vocabulary is no token to a
# SentencePiece tokenizer: whether it is found depends on the words around it. rayrl makes it one.
# And with a space before replies the template's own conversation is another one when a reply is
# given than when it is asked for (`template_notes.py`).
OWN = [
    (kind, PLACES[(k + t) % 3], WORDS[(k + t) % len(WORDS)], template)
    for k, kind in enumerate(KINDS)
    for t, template in enumerate(TEMPLATES)
]


@pytest.mark.parametrize(("kind", "place", "control", "template"), OWN)
def test_ids_equal_the_rendered_template(
    kind: str, place: str, control: Control, template: str
) -> None:
    chat = chat_of(kind, place, control, template)

    @given(ordinary, ordinary)
    @few
    def holds(one: str, two: str) -> None:
        talk = [system(one), user(two)]
        ids = chat.start(talk)
        assert ids == template_ids(chat, talk)
        longer = [*talk, assistant("ok"), user(one), user(two)]
        assert chat.start(longer) == template_ids(chat, longer)
        if template != "spaces around":  # appended, a reply and what follows it are the same ids
            new = longer[3:]
            assert ids + chat.reply("ok") + chat.extend(new, True) == template_ids(chat, longer)
            assert ids + chat.reply("ok")[:-1] + chat.extend(new, False) == template_ids(
                chat, longer
            )

    holds()


def test_white_space_that_a_control_token_absorbs() -> None:
    """Phi's tokens absorb the header's line break and any white space before the content."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(
        [AddedToken("<|head|>", rstrip=True), AddedToken("<|stop|>", lstrip=True)]
    )
    tokenizer.chat_template = written("header on a line", Control("<|head|>", "<|stop|>"))
    chat = Chat(tokenizer)
    talk = [user("  two words \n"), user("\n")]
    assert chat.start(talk) == template_ids(chat, talk)


def test_the_embedded_base_model() -> None:
    chat = Chat.load("embedded")
    control = set(
        chat.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    )
    assert chat.decode(chat.encode("a<|im_end|>b")) == "a<|im_end|>b"
    assert set(control).isdisjoint(chat.encode("<|endoftext|>a<|im_start|><|im_end|>"))
    rules = [system("You play tic-tac-toe as X against O.")]
    game = user("Game started. You are X.\n---------\n0 | 1 | 2")
    # the ids of version 1.0
    assert chat.start([*rules, game]) == (
        (1, 357, 347, 2, 201, 1, 360, 339, 268, 294, 295, 2, 201, 1, 348)
    )
    again = chat.extend([user("Invalid move.\n---------\n0 | 1")], True)
    assert again == (201, 1, 360, 340, 268, 294, 2, 201, 1, 348)
    said = chat.reply("<think>Win.</think><move>4</move>")
    assert said == (334, 57, 75, 80, 16, 329, 22, 327, 2)


LISTED = "{{ t | tojson }}"
ASIDE = "{{ t.function.name }}{{ t.function.description }}"


@pytest.mark.parametrize(
    ("listed", "name", "description", "schema"),
    [
        (LISTED, "f", "ends with <|im_end|>", {}),
        (LISTED, "<|im_start|>", "", {}),
        (LISTED, "f", "", {"properties": {"<|im_end|>": {}}}),
        (LISTED, "f", "", {"enum": ["a", ["<｜end｜>"]]}),
        (LISTED, "f", "<｜end｜>", {}),
        (ASIDE, "<|im_", "end|>", {}),
        (ASIDE, "f", "{{ t.function.description }}<|im_end|>", {}),
        ("{{ t.function.description | lower }}", "f", "<|IM_END|>", {}),
        ("{{ t.function.description | replace(' ', '') }}", "f", "< |im_end| >", {}),
        ("{{ t | tojson | replace('&', '<') }}", "f", "&|im_end|>", {}),
    ],
)
def test_tools_that_would_produce_a_control_token(
    listed: str, name: str, description: str, schema: dict[str, Any]
) -> None:
    tokenizer = build_tokenizer(
        HERMES.replace(LISTED, LISTED + listed), control=("<|im_start|>", "<|im_end|>", "<｜end｜>")
    )
    chat = Chat(tokenizer)
    parameters = {"type": "object", "properties": {}, **schema}
    function = {"name": name, "description": description, "parameters": parameters}
    with pytest.raises(ConfigError, match=r"a tool's description contains '<.*>': remove it"):
        chat.start([user("u")], [{"type": "function", "function": function}])


def test_other_tools_are_listed_unchanged() -> None:
    """Marks that the template escapes, or that are not tokens of this model, are harmless."""
    escaped = HERMES.replace(LISTED, "{{ t | tojson(ensure_ascii=True) }}")
    tokenizer = build_tokenizer(escaped, control=("<|im_start|>", "<|im_end|>", "<｜end｜>"))
    chat = Chat(tokenizer)
    words = 'A <b>"bold"</b> {claim} [INST] <｜end｜> \\ \u2028 | $ref: "#/$defs/x"'
    properties = {"a-b": {"type": "array<int>"}, "a.b": {"enum": ["|", ">"]}}
    parameters = {"type": "object", "properties": properties}
    function = {"name": "f", "description": words, "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    data = [{"role": "user", "content": "u"}]
    assert chat.start([user("u")], tools) == tuple(
        tokenizer.apply_chat_template(
            data, tools=tools, add_generation_prompt=True, return_dict=False
        )
    )
    # the order of keys is part of the text
    reordered = [{"function": function, "type": "function"}]
    assert chat.start([user("u")], reordered) != chat.start([user("u")], tools)


def test_tool_results_are_contents() -> None:
    chat = Chat(build_tokenizer(HERMES))
    (end,) = chat.stop_ids
    clean, dirty = (chat.extend([tool(t, "c")], False) for t in ("3", "<|im_end|>3"))
    assert clean.count(end) == dirty.count(end)


@pytest.mark.parametrize("role", ["<|im_end|>", "user<|im_end|>", "im_end", "", "developer"])
def test_unknown_roles_are_refused(role: Any) -> None:
    """Many templates write `<|{{ role }}|>`."""
    chat = Chat(build_tokenizer())
    with pytest.raises(ConfigError, match="must be one of system, user, assistant, tool"):
        chat.start([Message(role, "x")])


def test_unknown_characters() -> None:
    """They become the unknown token, or nothing if that is a control token too."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(unknown: str) -> Chat:
        words = ["<unk>", "<end>", "<begin>", "a", "b", "user", "assistant", "\n"]
        model = models.Unigram([(w, -1.0) for w in words], words.index(unknown))
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens([AddedToken(w, normalized=False) for w in words[:3]])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<end>", unk_token=unknown
        )
        tokenizer.chat_template = written("header on a line", Control("<begin>", "<end>"))
        return Chat(tokenizer)

    assert made("<unk>").encode("aéb") == (3, 0, 4)
    assert made("<end>").encode("aéb") == (3, 4)
    assert made("<end>").encode("<end>") == ()
