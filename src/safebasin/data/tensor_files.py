"""The safetensors files of a model folder: which they are, and the names, kinds and shapes of their tensors."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from safebasin.data.files import cause, regular_file, shown
from safebasin.data.json_rows import read_json
from safebasin.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")  # how safetensors names the kinds of plain weights
LFS = b"version https://git-lfs"  # the beginning of a pointer that git leaves in the place of a large file


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """An open safetensors file; its tensors are read one at a time.

    Raises:
        UserError: it cannot be read: missing, cut off, another format, or a pointer of git-lfs.
    """
    try:
        with regular_file(path).open("rb") as raw:
            pointer = raw.read(len(LFS)) == LFS
        if pointer:
            raise UserError(
                f"{shown(path)} is a pointer of git-lfs and holds no weights; fetch them with: git lfs pull"
            )
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shown(path)} cannot be read: {cause(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads of a folder: model.safetensors or those of its index; with neither, all.

    Raises:
        UserError: the index cannot be read, names a file elsewhere, or stands beside another set of weights.
    """
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        return [one] if one.exists() else sorted(folder.glob("*.safetensors"))
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else [""]
    if wrong := [name for name in names if not name or Path(name).name != name]:
        raise UserError(f"{shown(index)} names {shown(repr(wrong[0]))}, which is no file of its folder")
    if one.exists() and names != [one.name]:
        raise UserError(
            f"{shown(index)} names other files, and {one.name} is there too: two sets of weights; remove one"
        )
    return [folder / name for name in names]


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """The tensors of a model folder: name -> the safetensors file that holds it.

    Raises:
        UserError: not a folder, or one without readable safetensors; a tensor that stands in two files.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{shown(folder)} is not a folder of weights; download the model first and give its folder")
    files: dict[str, Path] = {}
    for path in weight_files(Path(folder)):
        with open_tensors(path) as file:
            if twice := files.keys() & file.keys():
                raise UserError(
                    f"{shown(path)} holds {min(twice)}, as does {files[min(twice)].name}; remove one of them"
                )
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise UserError(
            f"{shown(folder)} holds no *.safetensors file; other formats can run code when read and are refused"
        )
    return files


def float_shape(files: Mapping[str, Path], name: str, folder: str | Path) -> tuple[int, ...]:
    """The shape of a tensor in float. ``files``: ``tensor_files`` of the folder.

    Raises:
        UserError: there is no such tensor, or it is quantized.
    """
    if name not in files:
        raise UserError(f"{shown(folder)} has no tensor {name}; the weights that it is compared with have one")
    with open_tensors(files[name]) as file:
        part = file.get_slice(name)
        if (kind := part.get_dtype()) not in FLOATS:
            raise UserError(f"{shown(folder)}: {name} is stored as {kind}; give the weights before quantization")
        return tuple(part.get_shape())


def tensor_kinds(files: Iterable[Path]) -> dict[str, str]:
    """The kind of every stored tensor as safetensors names it ("BF16", "I8", ...): name -> kind.

    Raises:
        UserError: a file that cannot be read.
    """
    kinds: dict[str, str] = {}
    for path in files:
        with open_tensors(path) as file:
            kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return kinds
