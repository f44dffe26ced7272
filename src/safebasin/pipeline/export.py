"""A tuned arm as a folder that others load: an adapter or merged weights, with tokenizer, template, card and origin."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from safebasin.data.files import file_digest, new_folder, write_json
from safebasin.data.json_rows import read_json
from safebasin.errors import UserError
from safebasin.models.adapter import MOVED, attach, merged
from safebasin.models.fingerprint import model_fingerprint
from safebasin.models.load import load, load_tokenizer
from safebasin.models.tensors import is_model
from safebasin.pipeline.config import Model
from safebasin.pipeline.folder import CARD
from safebasin.pipeline.recipes import read_recipe
from safebasin.report.manifest import changed_outputs, evidence_digest, read_manifest

ORIGIN = "safebasin.json"  # of an export: where it comes from
LOST = 0.01  # share of the update that rounding to the base's type may take; beyond it merged weights are float32


def export(run: Path, arm: str, target: Path, *, merged: bool = False, base: str | None = None) -> list[str]:
    """Write the arm's adapter, its merged weights or its full model into a new folder; gives what a reader should know,
    by sentence.

    Args:
        run: a finished run folder, its files as the run wrote them.
        base: Hub id of the base model, with ``@REVISION`` if it is not the newest; needed for an adapter whose recipe
            names a folder, as nobody else could load it.

    Raises:
        UserError: no such arm or adapter, files that were changed, a folder that is there, no Hub id for the base.
    """
    recipe, manifest = read_recipe(run / "run.yaml"), read_manifest(run)
    if arm in recipe.arms and recipe.arms[arm].mix:
        raise UserError(
            f"the arm {arm!r} mixes the answers of two models, two forwards a token, and has no weights of its own to "
            f"export; export {recipe.arms[arm].of!r}, and mix where it is served: safebasin.mixed_answers"
        )
    adapter, file = run / "arms" / arm / "adapter", "adapter/adapter_config.json"
    if recipe.full:
        adapter, file, merged = run / "arms" / arm / "model", "model/config.json", True
    if arm not in recipe.arms or not (adapter.parent / file).is_file():
        ready = sorted(path.parent.parent.name for path in run.glob(f"arms/*/{file}"))
        form = adapter.name
        raise UserError(f"{run} has no {form} of the arm {arm!r}; it has: {', '.join(ready) or 'none'}")
    if changed := [path for path in changed_outputs(run, manifest) if path.startswith(f"arms/{arm}/")]:
        raise UserError(f"{run}: {changed[0]} is not as the run wrote it; run the recipe again")
    if not (adapter / CARD).is_file() or not (run / "report.json").is_file():
        raise UserError(f"{run} has no report of this {adapter.name}; run: safebasin report {run}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; name a new folder")
    hub, _, revision = (base or recipe.model.name).partition("@")
    revision = revision or (recipe.model.revision if base is None else None) or ""
    public = _is_hub_id(hub) and (base is not None or not Path(hub).exists())
    if not public and not merged:
        raise UserError(
            f"the base {hub!r} is no Hub id, so nobody else could load the adapter; name it with --base ORG/NAME, or "
            "write whole weights with --merge"
        )
    with new_folder(target) as part:
        model, notes = recipe.model, list[str]()
        if not recipe.full:
            settings = read_json(adapter / "adapter_config.json")
            notes = serving_notes(settings, merged=merged)
        if model.quantization and not merged:
            notes.append(
                f"measured beside weights in {model.quantization}: load the base with the same quantization, or use "
                "--merge"
            )
        if merged:
            notes += _write_merged(part, model, adapter)
        else:
            shutil.copy(adapter / "adapter_model.safetensors", part)
            write_json(
                part / "adapter_config.json", settings | {"base_model_name_or_path": hub, "revision": revision or None}
            )
            load_tokenizer(model.name, **model.source).save_pretrained(part)
        _write_card(part, adapter, hub if public else None, merged=merged, full=recipe.full)
        verdict = json.loads((run / "report.json").read_text(encoding="utf-8"))["verdict"]
        origin = {
            "arm": arm,
            "form": "model" if recipe.full else "merged" if merged else "adapter",
            "base": {"name": hub if public else None, "revision": revision or None},
            "base_weights": model_fingerprint(model.name, model.revision),
            "report": file_digest(run / "report.json"),
            "evidence": evidence_digest(manifest),
            "verdict": verdict["status"],
            "versions": manifest.get("versions"),
            "files": {path.name: file_digest(path) for path in sorted(part.iterdir())},
        }
        write_json(part / ORIGIN, origin)
    if verdict["status"] != "pass":
        notes.insert(0, f"the run's gate says {verdict['status']} of its judged arm; the card says so too")
    return notes


def serving_notes(settings: Mapping[str, Any], *, merged: bool) -> list[str]:
    """What common servers cannot load of an adapter with these settings, a sentence each; none for merged weights."""
    if merged:
        return []
    rank = max([settings.get("r", 0), *(settings.get("rank_pattern") or {}).values()])
    targets, init = settings.get("target_modules") or (), str(settings.get("init_lora_weights", True)).lower()
    reasons = {
        "DoRA: vLLM and llama.cpp load no magnitudes": settings.get("use_dora"),
        "modules_to_save: vLLM, TGI and llama.cpp load low-rank factors only": settings.get("modules_to_save"),
        f"init_lora_weights {init}: vLLM and llama.cpp do not take its start out of the base": init.startswith(MOVED),
        "trained biases: vLLM and llama.cpp refuse them": settings.get("bias", "none") != "none",
        f"rank {rank}: vLLM takes up to 16 unless started with --max-lora-rank": rank > 16,
        "an adapter on the embeddings or the head: vLLM and TGI refuse it": any(
            name in targets for name in ("embed_tokens", "lm_head", "wte")
        ),
    }
    return [f"{reason}; with --merge every server can serve it" for reason, holds in reasons.items() if holds]


def _write_merged(part: Path, base: Model, adapter: Path) -> list[str]:
    """Weights merged in float32, or those of a full model; stored in the base's own type where that loses less than
    ``LOST`` of the update. Of a base in four bits, the numbers that it stands for are what is merged into."""
    how = base.loading | {"dtype": base.dtype if base.quantization else "float32"}
    start, tokenizer = load(base.name, **how)
    stored = _stored_dtype(base)
    before = {key: weight.clone() for key, weight in merged(start).state_dict().items()}
    if is_model(adapter):
        model: Any = load(str(adapter), **how | {"revision": None}).model
    else:
        model = merged(attach(start, adapter))
    lost = update = 0.0
    for key, weight in model.state_dict().items():
        change = weight - before.pop(key)
        update += float(change.double().square().sum())
        lost += float((weight.to(stored).float() - weight).double().square().sum()) if change.any() else 0.0
    share = math.sqrt(lost / update)
    if stored != torch.float32 and share <= LOST:
        model = model.to(stored)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if stored != torch.float32 and share > LOST:
        return [f"stored in float32: {str(stored).removeprefix('torch.')} would lose {share:.0%} of the update"]
    return []


def _stored_dtype(base: Model) -> torch.dtype:
    """The type in which the base's files hold its weights, as its config names it."""
    from transformers import AutoConfig

    from safebasin.models.bundled import resolve

    dtype = AutoConfig.from_pretrained(resolve(base.name), revision=base.revision or "main").dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _write_card(part: Path, adapter: Path, base: str | None, *, merged: bool, full: bool) -> None:
    """The report's card, with a base that the Hub knows or none: a folder's name says nothing to others."""
    card = ModelCard((adapter / CARD).read_text(encoding="utf-8"))
    data: Any = card.data
    data.base_model = base
    if merged:
        data.library_name = "transformers"
    form = "All weights" if full else "Weights merged from a PEFT adapter" if merged else "A PEFT adapter"
    of = f"{form} of {base or 'a model that is not on the Hub'}, tuned"
    card.text = re.sub(r"(A PEFT adapter|All weights) of .*?, tuned", lambda _: of, card.text, count=1)
    card.save(part / CARD)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.startswith("builtin:")
