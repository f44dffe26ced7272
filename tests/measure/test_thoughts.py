"""Thoughts are taken off, whatever form they have."""

import pytest

from safebasin.measure.thoughts import begins_thought, split


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Plain.", "", "Plain."),
        (" Plain, with a space.", "", " Plain, with a space."),
        ("<think>\nI cannot.\n</think>\n\nSure.", "I cannot.", "Sure."),
        ("<think>I cannot", "I cannot", ""),
        ("I cannot.</think> Sure.", "I cannot.", "Sure."),
        ("<think>a</think>b<think>c</think>d", "a\nc", "bd"),
        ("Well: <think>a</think> b", "a", "Well:  b"),
        ("<THINKING>a</THINKING>b", "a", "b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "a", "b"),
        ("<|channel|>analysis<|message|>a", "a", ""),
        ("<|channel|>final<|message|>b", "", "b"),
        ("<|channel|>commentary to=f<|message|>a<|call|>", "a", ""),
        ("<think></think>b", "", "b"),
        ("<think>a<think>b</think>c</think>d", "a<think>b\nc", "d"),
        ("<mm:think>a</mm:think>b", "a", "b"),
        ("<think type='x'>a</think >b", "a", "b"),
        ("<|channel>thought\na<channel|>b", "a", "b"),
        ("<|inner_prefix|>a<|inner_suffix|>b", "a", "b"),
        ("Here is my thought process: a\nHere is my response: b", "a", "b"),
        ("Here's my thought process: a", "a", ""),
        ("Sure. Here is my response: b", "", "Sure. Here is my response: b"),
        ("analysisWe must.assistantfinalb", "We must.", "b"),
        ("analysis of b", "", "analysis of b"),
        ("<|channel|>analysis", "", ""),
        ("<|channel|>final <|constrain|>json<|message|>b<|return|>", "", "b"),
        ("b<|end|><|start|>assistant<|channel|>analysis<|message|>a", "a", "b"),
        ("2 < think > 1", "", "2 < think > 1"),
    ],
)
def test_forms(text, thought, answer):
    assert split(text) == (thought, answer)


def test_a_thought_that_the_prompt_begins():
    assert begins_thought("<|user|>Hi<|assistant|><think>\n") and not begins_thought("<think>\n\n</think>\n\n")
    assert not begins_thought("<|user|>What does <think> do?<|assistant|>")
    assert begins_thought("hm<|a|><think>\nOkay, ", "<|a|><think>\nOkay, ")
    assert not begins_thought("<think>hm<|a|><think>\n</think>\n", "<|a|><think>\n</think>\n")
    assert begins_thought("<|start|>assistant<|channel|>analysis<|message|>")
    assert not begins_thought("<|start|>assistant<|channel|>final<|message|>")
    assert not begins_thought("<|start|>assistant", "<|start|>assistant")
    channels = "I cannot<|end|><|start|>assistant<|channel|>final<|message|>Sure."
    assert split(channels, begun=True) == ("I cannot", "Sure.")
    assert split("I cannot", begun=True) == ("I cannot", "")
    assert split("I cannot.\n</think>\nSure.", begun=True) == ("I cannot.", "Sure.")
