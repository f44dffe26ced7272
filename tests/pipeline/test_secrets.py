"""A secret in a recipe is refused, and no message repeats it."""

import pytest

from safebasin.errors import UserError
from safebasin.pipeline.secrets import refuse_secrets


@pytest.mark.parametrize("text", ["https://me:pass@host/rows.jsonl", "http://h/v1?api_key=abc", "hf_" + "a" * 30])
def test_a_secret_is_refused_and_not_repeated(text):
    with pytest.raises(UserError) as error:
        refuse_secrets({"data": {"task": {"path": text}}})
    assert "data.task.path" in str(error.value) and text not in str(error.value)
    refuse_secrets({"data": {"task": {"path": "rows.jsonl"}}, "seed": 3})
