"""A folder of parts: the files that items make. What is done is what lies in it, so going on is a listing."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from safebasin.data.files import cause, shown, write_json
from safebasin.data.json_rows import read_json
from safebasin.errors import UserError
from safebasin.spread import Item

ItemKind = TypeVar("ItemKind", bound=Item)
KEY = "key.json"
FIRST = "first.json"


class Parts:
    """Parts of one step, as ``folder/<name><ending>``.

    Args:
        folder: created where it is missing; its folder must be shared where the engine has several machines.
        key: the digest of all that decides the parts. A folder of another key is emptied.
        ending: of the parts' names: ``.parquet``.
    """

    def __init__(self, folder: Path, key: str, ending: str):
        self.folder, self.ending, self._key = folder.absolute(), ending, key

    def open(self) -> None:
        """Make the folder ready for this key. Of processes that share a step, one does it.

        Raises:
            UserError: it cannot be written.
        """
        file = self.folder / KEY
        try:
            if self.folder.is_dir() and not (file.is_file() and _read(file) == self._key):
                shutil.rmtree(self.folder)
            if not file.is_file():
                self.folder.mkdir(parents=True)
                write_json(file, self._key)
        except OSError as error:
            raise UserError(f"cannot write parts to {shown(self.folder)}: {cause(error)}") from error

    def path(self, name: str) -> Path:
        """The part of an item, by the item's name."""
        return self.folder / f"{name}{self.ending}"

    def missing(self, items: Iterable[ItemKind]) -> list[ItemKind]:
        """The items whose parts are not there, in their order."""
        with os.scandir(self.folder) as entries:
            there = {entry.name for entry in entries}
        return [item for item in items if f"{item.name}{self.ending}" not in there]

    def clear(self) -> None:
        """Remove the folder, when the parts are joined."""
        shutil.rmtree(self.folder, ignore_errors=True)


def first_of_all(folder: Path, value: object) -> object:
    """What the first worker of a step wrote beside its parts: ``value`` where this is the first one.

    Workers compare themselves with it: two kinds of machine or library must not make one result.
    """
    file, part = folder / FIRST, folder / f"{FIRST}.{os.urandom(4).hex()}.part"
    if not file.is_file():
        write_json(part, value)
        try:
            os.link(part, file)  # unlike a rename, it gives way to a file that is there
            part.unlink()
        except FileExistsError:
            part.unlink()
        except OSError:  # a file system without links
            part.replace(file)
    return _read(file)


def _read(file: Path) -> object:
    """None where the file is damaged."""
    with contextlib.suppress(UserError):
        return read_json(file)
    return None
