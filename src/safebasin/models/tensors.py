"""The float matrices of a model, read from its files one at a time."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor, nn

from safebasin.data.files import shown
from safebasin.data.json_rows import read_json
from safebasin.data.tensor_files import float_shape, open_tensors, tensor_files
from safebasin.errors import UserError
from safebasin.layer import LazyMapping
from safebasin.models.border import loading
from safebasin.models.bundled import resolve

BLOCK = re.compile(r"(?P<module>.+\.\d+\..+)\.weight")  # a weight inside a block; embeddings and heads are outside


class Tensors(LazyMapping[str, Tensor]):
    """The float matrices of a model folder or a Hub id: name -> tensor, read one at a time.

    Raises:
        UserError: it cannot be read, or its weights are quantized.
    """

    def __init__(self, model: str | Path):
        self.folder = model_folder(model)
        self.names = self.files = tensor_files(self.folder)
        config = self.folder / "config.json"
        if config.is_file() and (settings := read_json(config)).get("quantization_config"):
            kind = settings["quantization_config"].get("quant_method", "of some kind")
            raise UserError(
                f"{shown(model)} is quantized ({kind}); an update is relative to the weights before quantization"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in float.

        Raises:
            UserError: there is no such tensor, or it is quantized.
        """
        return float_shape(self.files, name, self.folder)

    def __getitem__(self, name: str) -> Tensor:
        with open_tensors(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class ModelShapes:
    """The shapes of a loaded model, in the place of those of its files."""

    def __init__(self, model: nn.Module):
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def shape(self, name: str) -> tuple[int, ...]:
        """UserError where there is no such tensor."""
        if name not in self.shapes:
            raise UserError(f"the model has no tensor {name}; adapter and model must be of one model")
        return self.shapes[name]


def model_folder(name: str | Path) -> Path:
    """The folder of a model: a folder, a ``builtin:`` name, or a Hub id that is fetched.

    Raises:
        UserError: it cannot be fetched, or is an adapter.
    """
    with loading(f"the model {shown(name)!r}"):
        folder = Path(resolve(str(name)))
        if not folder.exists():
            folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{shown(name)} is an adapter, not a model: adapters on adapters are refused; merge it first")
    return folder


def is_model(name: str | Path) -> bool:
    """Whether a folder is that of a full model."""
    return (Path(name) / "config.json").is_file()
