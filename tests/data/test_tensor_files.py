"""Folders without weights that can be read are refused; tests/models/test_load.py has more of them."""

import pytest

from safebasin.data.tensor_files import tensor_files
from safebasin.errors import UserError


def test_folders_without_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path, "cannot be read"), (tmp_path / "empty", "holds no"), ("org/name", "download")):
        with pytest.raises(UserError, match=message):
            tensor_files(folder)
