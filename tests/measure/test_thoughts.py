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
    ],
)
def test_forms(text, thought, answer):
    assert split(text) == (thought, answer)


def test_a_thought_that_the_prompt_begins():
    assert begins_thought("<|user|>Hi<|assistant|><think>\n") and not begins_thought("<think>\n\n</think>\n\n")
    assert not begins_thought("<|user|>What does <think> do?<|assistant|>")
    assert split("I cannot", begun=True) == ("I cannot", "")
    assert split("I cannot.\n</think>\nSure.", begun=True) == ("I cannot.", "Sure.")
