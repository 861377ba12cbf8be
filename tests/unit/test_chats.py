"""Chats are rendered as Transformers renders them, whatever form their messages have; what cannot be is a sentence."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpinfer.engine.chats import chat_token_ids
from cpinfer.errors import UnsupportedError, UserError

ROOT = Path(__file__).parents[2]
USER = {"role": "user", "content": "How warm is it in Oslo?"}
BEGUN = {"role": "assistant", "content": "It is about"}
CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"city": "Oslo"}}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "warmth",
        "description": "Degrees in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# Of TRL's collection of chat templates: those that render parts, and those that would lose or quote them.
WALKING = ["gemma3", "gemma4", "glm4moe", "qwen2_5_vl", "qwen3_6", "qwen3_vl"]
JOINING = ["cohere2", "deepseekv3", "gptoss", "lfm2", "llama3_2", "phi3", "qwen2_5", "qwen3", "qwen3_instruct_2507"]
# Reads a content as it comes: what a template's author thinks of when nobody sends parts.
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{{ '<assistant>' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "configs" / "recall-tiny")


@pytest.fixture
def with_template(tokenizer, monkeypatch):
    """The tokenizer with another chat template: a text, or the name of one of TRL's."""

    def with_template(template):
        if "{" not in template:
            trl = pytest.importorskip("trl")
            template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return with_template


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def theirs(tokenizer, messages, **options):
    """Transformers' own answer."""
    options = options or {"add_generation_prompt": True}
    return tuple(tokenizer.apply_chat_template(messages, return_dict=False, **options))


@pytest.mark.parametrize("name", [*WALKING, *JOINING])
def test_a_message_of_one_text_part_is_a_message_of_that_text(with_template, name):
    tokenizer = with_template(name)
    for content in (parts(USER["content"]), [USER["content"]], [{"type": "input_text", "text": USER["content"]}]):
        chat = [{"role": "user", "content": content}]
        assert chat_token_ids(chat, tokenizer) == theirs(tokenizer, [USER])


@pytest.mark.parametrize("name", WALKING)
def test_parts_that_a_template_renders_itself_are_rendered_by_it(with_template, name):
    tokenizer = with_template(name)
    chat = [{"role": "user", "content": parts("one", "two")}, BEGUN, {"role": "user", "content": parts("three")}]
    expected = theirs(tokenizer, chat)
    assert all(word in tokenizer.decode(expected) for word in ("one", "two", "three"))
    assert chat_token_ids(chat, tokenizer) == expected


@pytest.mark.parametrize("name", JOINING)
def test_parts_that_a_template_would_lose_or_quote_are_one_text_by_lines(with_template, name):
    tokenizer = with_template(name)
    chat = [{"role": "user", "content": parts("one", "two")}, BEGUN, {"role": "user", "content": parts("three")}]
    joined = [{"role": "user", "content": "one\ntwo"}, BEGUN, {"role": "user", "content": "three"}]
    assert chat_token_ids(chat, tokenizer) == theirs(tokenizer, joined)


def test_no_part_becomes_what_python_prints_of_it(with_template):
    tokenizer = with_template(PLAIN)
    chat = [{"role": "user", "content": parts("hi")}]
    assert "{'type'" in tokenizer.decode(theirs(tokenizer, chat)), "which is what the template alone makes of it"
    assert tokenizer.decode(chat_token_ids(chat, tokenizer)) == "<user>hi;<assistant>"
    quoting = with_template("{{ messages[0].content | tojson }}")
    assert quoting.decode(chat_token_ids(chat, quoting)) == '"hi"'


def test_the_messages_of_a_caller_stay_as_they_are(with_template):
    chat = [{"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": parts("c")}]
    before = [{**message, "content": list(message["content"])} for message in chat]
    chat_token_ids(chat, with_template("qwen3_6"))
    assert chat == before


@pytest.mark.parametrize("name", ["llama3_2", "phi3", "qwen3", "qwen3_6"])
def test_a_final_assistant_message_is_continued_and_any_other_is_answered(with_template, name):
    tokenizer = with_template(name)
    continued = theirs(tokenizer, [USER, BEGUN], continue_final_message=True)
    assert tokenizer.decode(continued).endswith("It is about")
    assert chat_token_ids([USER, BEGUN], tokenizer) == continued
    assert chat_token_ids([USER, {**BEGUN, "content": parts(BEGUN["content"])}], tokenizer) == continued
    assert chat_token_ids([USER, BEGUN, USER], tokenizer) == theirs(tokenizer, [USER, BEGUN, USER])


@pytest.mark.parametrize("name", ["llama3_1", "qwen2_5", "qwen3"])
def test_tools_are_those_that_the_template_is_given(with_template, name):
    tokenizer = with_template(name)
    expected = theirs(tokenizer, [USER], tools=[WEATHER], add_generation_prompt=True)
    assert expected != theirs(tokenizer, [USER])
    assert chat_token_ids([USER], tokenizer, [WEATHER]) == expected
    assert chat_token_ids([USER], tokenizer, []) == theirs(tokenizer, [USER])


@pytest.mark.parametrize("thinks", [True, False])
def test_what_else_a_template_reads_it_is_given(with_template, thinks):
    tokenizer = with_template("qwen3")
    asked = {"enable_thinking": thinks}
    assert chat_token_ids([USER], tokenizer, None, asked) == theirs(
        tokenizer, [USER], add_generation_prompt=True, **asked
    )
    assert ("</think>" in tokenizer.decode(chat_token_ids([USER], tokenizer, None, asked))) is not thinks


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
def test_an_assistant_that_calls_a_tool_need_not_say_anything(with_template, content):
    tokenizer = with_template("qwen3")
    called = {"role": "assistant", **content, "tool_calls": [CALL]}
    chat = [USER, called, {"role": "tool", "content": parts("3")}]
    expected = theirs(tokenizer, [USER, {**called, "content": ""}, {"role": "tool", "content": "3"}])
    assert chat_token_ids(chat, tokenizer, [WEATHER]) == theirs(
        tokenizer,
        [USER, {**called, "content": ""}, {"role": "tool", "content": "3"}],
        tools=[WEATHER],
        add_generation_prompt=True,
    )
    assert chat_token_ids(chat, tokenizer) == expected and "None" not in tokenizer.decode(expected)


def test_a_content_of_null_never_reaches_a_template(with_template):
    """Not all versions of Transformers leave it out themselves."""
    seen = []

    class Watched:
        def apply_chat_template(self, messages, **_):
            seen.extend(messages)
            return [1]

    chat_token_ids([{"role": "assistant", "content": None, "tool_calls": [CALL]}, USER], Watched())
    assert "content" not in seen[0]


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "user"}, '"messages[1].content" is missing; a text or a list of text parts was wanted'),
        ({"role": "user", "content": None}, '"messages[1].content" is null; a text'),
        ({"role": "assistant", "content": None}, '"messages[1].content" is null'),
        ({"role": "assistant", "content": None, "tool_calls": []}, '"messages[1].content" is null'),
        ({"role": "user", "content": 5}, '"messages[1].content" is 5'),
        ({"role": "user", "content": True}, '"messages[1].content" is true'),
        ({"role": "user", "content": []}, '"messages[1].content" is []'),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, '"messages[1].content" is {"type"'),
        ({"role": "user", "content": [5]}, '"messages[1].content[0]" is 5; {"type": "text", "text": ...} was wanted'),
        ({"role": "user", "content": ["a", None]}, '"messages[1].content[1]" is null'),
        ({"role": "user", "content": [{"type": "text"}]}, '"messages[1].content[0]" is {"type": "text"}'),
        ({"role": "user", "content": [{"text": "a"}]}, '"messages[1].content[0]" is {"text": "a"}'),
        ({"role": "user", "content": [{"type": 5, "text": "a"}]}, '"messages[1].content[0]" is {"type": 5'),
        ({"role": "user", "content": [{"type": "text", "text": ["a"]}]}, '"messages[1].content[0]" is'),
        ({"role": 5, "content": "a"}, '"messages[1].role" is 5; a text was wanted'),
        ({"content": "a"}, '"messages[1].role" is null'),
    ],
)
def test_a_message_that_is_none_is_named_by_its_place(tokenizer, message, words):
    with pytest.raises(UserError) as caught:
        chat_token_ids([USER, message], tokenizer)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "thinking"])
def test_parts_that_are_no_text_are_refused_by_the_table(with_template, kind):
    tokenizer = with_template("qwen2_5_vl")
    with pytest.raises(
        UnsupportedError, match=rf'"messages\[0\].content\[1\]" is a part of type "{kind}": cpinfer does'
    ):
        chat_token_ids([{"role": "user", "content": [*parts("what is this?"), {"type": kind, "url": "x"}]}], tokenizer)


@pytest.mark.parametrize("name, value", [("tools", [WEATHER]), ("template_kwargs", {"enable_thinking": False})])
def test_what_a_template_does_not_read_is_refused(with_template, name, value):
    tokenizer = with_template("phi3")
    assert theirs(tokenizer, [USER], tools=[WEATHER], add_generation_prompt=True) == theirs(tokenizer, [USER])
    with pytest.raises(UserError, match=r"which the model's chat template does not read\. Leave it out"):
        chat_token_ids([USER], tokenizer, **{name: value})


@pytest.mark.parametrize(
    "given, words",
    [
        ({"tools": "warmth"}, '"tools" is "warmth"; a list of objects was wanted'),
        ({"tools": [len]}, '"tools" is ["<built-in'),
        ({"tools": {"type": "function"}}, '"tools" is {"type"'),
        ({"template_kwargs": []}, '"chat_template_kwargs" is []; an object was wanted'),
        (
            {"template_kwargs": {"enable_thinkin": False}},
            '"chat_template_kwargs" has "enable_thinkin", which the model',
        ),
        *(
            ({"template_kwargs": {name: True}}, f'"chat_template_kwargs" has "{name}", which is no variable of the')
            for name in ("add_generation_prompt", "tokenize", "messages", "tools", "continue_final_message", "padding")
        ),
    ],
    ids=str,
)
def test_what_no_template_can_be_given_is_named(with_template, given, words):
    with pytest.raises(UserError) as caught:
        chat_token_ids([USER], with_template("qwen3"), **given)
    assert words in str(caught.value)


def test_a_final_message_without_words_cannot_be_continued(with_template):
    with pytest.raises(UserError, match=r'"messages" do not fit the chat template: .*to continue'):
        chat_token_ids([USER, {"role": "assistant", "tool_calls": [CALL]}], with_template("qwen3"))
