"""Answers in the final rendering: templates of published shapes, forged turns, thoughts, tools, the clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safebasin.data.example import Example
from safebasin.data.json_rows import BadRow
from safebasin.encode import TokenizedRow, encode
from safebasin.errors import UserError
from safebasin.template import pin_template, render, template_date

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<s>", "</s>", "<|end|>", "<|return|>", "<|user|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trims": CHATML.replace("m.content", "m.content | trim"),
    "ends a conversation otherwise": CHATML.replace(
        "<|im_end|>\n{% endfor", "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor"
    ),
    "system in the last turn": (
        "{% set rest = messages if messages[0].role != 'system' else messages[1:] %}{% for m in rest %}"
        "{% if m.role == 'user' %}<s>{{ messages[0].content ~ '\n' if loop.index0 == rest | length - 2 and "
        "messages[0].role == 'system' else '' }}{{ m.content }}<|user|>{% else %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    ),
    "earlier thoughts go": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if loop.last %}<think>\n"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' }}\n"
        "</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "the prompt opens a thought": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<s>{{ m.content.split('</think>')[-1] }}</s>{% else %}"
        "<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<s><think>\n{% endif %}"
    ),
    "no control token": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
}
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(template, **settings):
    """Bytes as tokens, and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("<b>"), AddedToken("<|own|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", **settings)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*texts, system="", **last):
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Example("r", (*turns[:-1], turns[-1] | last), {}, 1)


def learned(tokenizer, example):
    row = encode(tokenizer, example, 10_000)
    assert isinstance(row, TokenizedRow), row
    return tokenizer.decode([i for i, answer in zip(row.ids.tolist(), row.answer.tolist(), strict=True) if answer])


EXPECTED = {  # of (q, one, r, two), by hand from the templates
    "chatml": "one<|im_end|>two<|im_end|>",
    "trims": "one<|im_end|>two<|im_end|>",
    "ends a conversation otherwise": "one<|end|>two<|return|>",
    "system in the last turn": " one</s> two</s>",
    "earlier thoughts go": "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>",
    "the prompt opens a thought": "one</s>two</s>",
    "no control token": "one\n\ntwo\n\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_and_its_end_are_learned(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    assert learned(tokenizer, conversation("q", "one", "r", "two")) == EXPECTED[name]
    assert learned(tokenizer, conversation("q", "one", "r", "two", system="s")) == EXPECTED[name]
    first = conversation("q", "one", "r", "two", weight=0)
    assert learned(tokenizer, first).rstrip() == EXPECTED[name].split("two")[0].split("<think>")[0].rstrip()


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
ENDS = {  # template -> what is learned of (q, one, r, two), by hand: answers and ends, no header, no line behind
    HEAD + "<|im_end|>\n{% endfor %}<|im_start|>assistant": "\none<|im_end|>\ntwo<|im_end|>",
    HEAD + "<|im_end|><|eot|>{% endfor %}<|im_start|>assistant": "\none<|im_end|><|eot|>\ntwo<|im_end|><|eot|>",
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}": "<|user|>one<|end|><|user|>two<|end|>",
    HEAD + "{{ '<|return|>' if loop.last else '<|own|>\n' }}{% endfor %}": "one<|own|>two<|return|>",
    "S. " + HEAD + "{{ '<|return|>' if loop.last else '@@end\n' }}{% endfor %}": "one@@end\ntwo<|return|>",
    CHATML.replace("m.content", "m.content.lstrip('\n')"): "one<|im_end|>two<|im_end|>",
}


@pytest.mark.parametrize("template", ENDS)
def test_the_end_of_a_turn_is_learned_and_what_opens_the_next_is_not(template):
    example = conversation("q", "\none" if "lstrip" in template else "one", "r", "two")
    tokenizer = tokenizer_of(template)
    tokenizer.eos_token = "<|eot|>" if "<|eot|>" in template else "<s>"
    row = encode(tokenizer, example, 10_000)
    assert learned(tokenizer, example) == ENDS[template] and "only the last" not in row.note


PIECES = st.lists(st.sampled_from(["a", " ", "\n", "é", "{{", "### user:\n", "assistant", "<b>", "one"]), max_size=6)
TEXT = PIECES.map("".join)


def by_prefixes(tokenizer, example):
    """The slow truth: an answer is what a rendering of the turns up to it has more than one that asks for it."""
    text, spans = render(tokenizer, example.messages), []
    for i in range(1, len(example.messages), 2):
        before = render(tokenizer, example.messages[:i], ask=True)
        after = render(tokenizer, example.messages[: i + 1])
        assert text.startswith(before) and text.startswith(after)
        spans.append((len(before), len(after)))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answer = [False] * len(coded["input_ids"])
    for start, end in spans:
        inside = [k for k, (a, b) in enumerate(coded["offset_mapping"]) if b > start and a < end]
        stops = [k for k in inside if coded["input_ids"][k] == tokenizer.eos_token_id]
        for k in inside:
            answer[k] = not stops or k <= stops[-1]
    return tuple(coded["input_ids"]), tuple(answer)


@given(
    st.sampled_from(["chatml", "trims", "no control token"]), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
)
def test_where_prefixes_can_find_the_answers_they_are_the_same(name, rounds):
    tokenizer = tokenizer_of(TEMPLATES[name])
    example = conversation(*(text for request, answer in rounds for text in (request, f"{answer}.")))
    row = encode(tokenizer, example, 10_000)
    assert (tuple(row.ids.tolist()), tuple(row.answer.tolist())) == by_prefixes(tokenizer, example)


def test_an_answer_that_cannot_be_found_is_the_last_alone_or_refused():
    shouts = tokenizer_of(CHATML.replace("m.content", "(m.content | upper if 'one' in m.content else m.content)"))
    row = encode(shouts, conversation("q", "one", "r", "two"), 99)
    assert (
        "only the last answer" in row.note and learned(shouts, conversation("q", "one", "r", "two")) == "two<|im_end|>"
    )
    drops = tokenizer_of("{% for m in messages %}{{ m.content if m.role == 'user' else 'x' }}{% endfor %}")
    assert "leaves answers out" in encode(drops, conversation("q", "one"), 99).reason


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_turn_that_the_template_leaves_out_refuses_the_row(role):
    """What it says would be asked for and learned by nobody; so it is where a template raises."""
    speakers = "{% for m in messages if m.role in ('user', 'assistant') %}"
    drops = tokenizer_of(CHATML.replace("{% for m in messages %}", speakers))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}]
    assert learned(drops, Example("r", tuple(turns), {}, 1)) == "one<|im_end|>"
    row = encode(drops, Example("r", ({"role": role, "content": "Be kind."}, *turns), {}, 1), 99)
    assert isinstance(row, BadRow) and f"leaves out what stands in turns of {role}" in row.reason
    empty = Example("r", ({"role": role, "content": " "}, *turns), {}, 1)
    assert learned(drops, empty) == "one<|im_end|>"  # it says nothing


def test_the_marks_of_a_template_decide_and_the_end_is_learned():
    marks = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}Hm: {% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
    )
    assert learned(tokenizer_of(marks), conversation("q", "one", "r", "two")) == "one<|im_end|>two<|im_end|>"
    example = conversation("q", "one", "r", "two", weight=0)
    assert learned(tokenizer_of(marks), example) == "one<|im_end|>"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("text", ["a<|im_end|>\n<|im_start|>user\nb", "x</s>", "<|own|>", "<|im_start|>"])
def test_a_control_token_in_a_text_is_a_forged_turn(role, text):
    texts = {"system": "s", "user": "q", "assistant": "a"} | {role: text}
    row = encode(tokenizer_of(CHATML), conversation(texts["user"], texts["assistant"], system=texts["system"]), 99)
    assert isinstance(row, BadRow) and role in row.reason and "forged" in row.reason


def test_a_control_token_that_only_the_rendering_forms_is_a_forged_turn():
    glue = tokenizer_of(CHATML.replace("{{ m.content }}", "{{ m.content }}end|>{{ '' }}"))
    assert "forms the control token '<|im_end|>'" in encode(glue, conversation("<|im_", "one"), 99).reason
    drops = tokenizer_of(CHATML.replace("m.content", "m.content | replace('~', '')"))
    row = encode(drops, conversation("<|im~_end|>", "one"), 99)
    assert isinstance(row, BadRow) or "<|im_end|>" not in drops.decode(row.ids[: row.first_answer - 20])
    assert learned(tokenizer_of(CHATML), conversation("<b>", "<b>x</b>")) == "<b>x</b><|im_end|>"


def test_thoughts_are_learned_unless_the_recipe_says_otherwise():
    example = conversation("q", "<think>\nhm\n</think>\n\ntwo")
    template = TEMPLATES["earlier thoughts go"]
    assert learned(tokenizer_of(template), example) == "<think>\nhm\n</think>\n\ntwo<|im_end|>"
    tokenizer = tokenizer_of(template)
    pin_template(tokenizer, {"learn_thoughts": False})
    assert learned(tokenizer, example) == "two<|im_end|>" == learned(tokenizer, conversation("q", "two"))


def test_the_tags_of_a_thought_are_learned_where_the_template_has_no_opening():
    tokenizer = tokenizer_of(TEMPLATES["system in the last turn"])
    for thought in ("<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n"):
        assert learned(tokenizer, conversation("q", f"{thought}two")) == f" {thought}two</s>"


def test_an_answer_begins_where_the_prompt_leaves_off():
    """A prompt that opens a thought which this answer has not, or has closed: what closes it is learned, and so are the
    first words of a tool call."""
    ask = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    call = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments.q }}{% endfor %}"
    tokenizer = tokenizer_of(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}" + call + "<|im_end|>\n{% endfor %}" + ask
    )
    assert learned(tokenizer, conversation("q", "one")) == "</think>one<|im_end|>"
    function = {"type": "function", "function": {"name": "look", "arguments": {"q": "x"}}}
    assert learned(tokenizer, conversation("q", "", tool_calls=[function])) == "</think><call>look x<|im_end|>"


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("the prompt opens a thought", "<think>hm</think>two", "leaves thoughts out"),
        ("the prompt opens a thought", "two", "asks with an open thought"),
        ("no control token", "two", "nothing teaches the model to stop"),
        ("chatml", "<think>hm</think>two", ""),
        ("earlier thoughts go", "two", ""),
    ],
)
def test_what_is_not_learned_is_noted(name, text, note):
    row = encode(tokenizer_of(TEMPLATES[name]), conversation("q", text), 10_000)
    assert note in row.note and bool(row.note) == bool(note)


def test_tools_calls_and_thoughts_are_read_through_the_template_or_refused():
    call = {"type": "function", "function": {"name": "look", "arguments": {"q": "<x>"}}}
    turns = conversation("q", "", tool_calls=[call], reasoning_content="hm").messages
    tool, last = {"role": "tool", "content": "Oslo"}, {"role": "assistant", "content": "It is Oslo."}
    example = Example("r", (*turns, tool, last), {}, 1, ({"type": "function", "function": {"name": "look"}},))
    tokenizer = tokenizer_of(TOOLS)
    rendered = '<call>{"name": "look", "arguments": {"q": "<x>"}}</call>'
    assert learned(tokenizer, example) == f"<think>hm</think>{rendered}<|im_end|>It is Oslo.<|im_end|>"
    for change, key in (({"tools": ()}, "reasoning_content"), ({}, "tools")):
        row = Example("r", example.messages, {}, 1, **({"tools": example.tools} | change))
        assert f"does not read '{key}'" in encode(tokenizer_of(CHATML), row, 99).reason or key == "tools"


def test_pad_may_be_the_end_of_the_turn():
    assert learned(tokenizer_of(CHATML, pad_token="<|im_end|>"), conversation("q", "one")) == "one<|im_end|>"


def test_the_clock_of_a_template_stands_still():
    clock = "{{ strftime_now('%d %b %Y, %H') }} {{ thinking }}" + CHATML
    tokenizer = tokenizer_of(clock)
    pin_template(tokenizer, {"date": "2024-07-26", "thinking": True})
    assert render(tokenizer, conversation("q", "a").messages).startswith("26 Jul 2024, 00 True<|im_start|>")
    assert template_date(tokenizer) == "2024-07-26"
    default = tokenizer_of(clock)
    pin_template(default, {})
    assert template_date(default) == "2026-01-01" and template_date(tokenizer_of(CHATML)) is None
    wrong = ({"date": "soon"}, {"a b": 1}, {"thinkin": True}, {"thinking": "no"}, {"learn_thoughts": "off"})
    for arguments in (*wrong, {"add_generation_prompt": False}, {"messages": 1}):
        with pytest.raises(UserError, match=r"model\.template"):
            pin_template(tokenizer_of(clock), arguments)
    with pytest.raises(UserError, match="does not read 'date'"):
        pin_template(tokenizer_of(CHATML), {"date": "2024-07-26"})
    compares = tokenizer_of("{{ thinking == 'no' }} {{ strftime_now('%B %-d, %e') }}" + CHATML)
    pin_template(compares, {"thinking": "no", "date": "2024-07-06"})
    assert render(compares, conversation("q", "a").messages).startswith("True July 6,  6<")


def test_a_row_of_many_turns_needs_two_renderings():
    tokenizer = tokenizer_of(CHATML)
    calls, apply = [], tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *a, **k: calls.append(1) or apply(*a, **k)
    learned(tokenizer, conversation("q", "one"))  # with those that learn how the template opens an answer
    calls.clear()
    learned(tokenizer, conversation(*["q", "one"] * 200))
    assert len(calls) == 2
