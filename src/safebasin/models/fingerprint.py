"""What a model name stands for, by content."""

import contextlib
import hashlib
import itertools
import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from safebasin.data.files import file_digest, shown, write_json
from safebasin.data.json_rows import read_json
from safebasin.errors import UserError
from safebasin.models.border import loading
from safebasin.models.bundled import cache, resolve

# configurations, tokenizers, weights of a model or an adapter; code and chat templates may have folders of their own
FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.safetensors", "**/*.py", "**/*.jinja")
LARGE = 2**20  # bytes; what is smaller is digested sooner than remembered
SETTLED = 2 * 10**9  # ns; a younger file may change again under the same time stamp, so it is read again


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """A digest of the files that a model name stands for: 32 hexadecimal digits; of a Hub id, its commit.

    Large files are read once: their digests are remembered by path, size and times, in the folder of converted models.

    Raises:
        UserError: there is no such model, or a file of it cannot be read.

    >>> model_fingerprint("builtin:smollm2")
    """
    what = f"the model {shown(name)!r}"
    with loading(what):
        folder = Path(resolve(name))
        if not folder.is_dir():  # the download asks the Hub for the newest commit, and offline takes the last one
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
        if not any((folder / settings).is_file() for settings in ("config.json", "adapter_config.json")):
            raise UserError(f"cannot load {what}: no config.json in it")
        files = sorted({path for path in itertools.chain(*map(folder.glob, FILES)) if path.is_file()})
        weights = file_digests([path for path in files if path.suffix == ".safetensors"])
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{weights.get(path) or file_digest(path)}\0".encode())
    return digest.hexdigest()


def file_digests(paths: list[Path]) -> dict[Path, str]:
    """Digests of files; those of large ones are remembered."""
    memory, stats = cache() / "digests.json", {path: path.stat() for path in paths}
    remembered = _remembered(memory) if any(stat.st_size >= LARGE for stat in stats.values()) else {}
    digests, new = dict[Path, str](), dict[str, Any]()
    for path, stat in stats.items():
        key, mark = os.path.abspath(path), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = remembered.get(key)
        if isinstance(entry, list) and entry[:-1] == mark and isinstance(entry[-1], str):
            digests[path] = entry[-1]
            continue
        digests[path] = file_digest(path)
        if stat.st_size >= LARGE and time.time_ns() - max(mark[1:]) > SETTLED:
            new[key] = [*mark, digests[path]]
    if new:
        with contextlib.suppress(UserError, OSError):  # without the memory it is slower, not wrong
            memory.parent.mkdir(parents=True, exist_ok=True)
            there = {key: entry for key, entry in _remembered(memory).items() if os.path.exists(key)}
            write_json(memory, there | new)
    return digests


def _remembered(memory: Path) -> dict[str, Any]:
    """The remembered digests; a file that is missing or damaged holds none."""
    try:
        content = read_json(memory)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
