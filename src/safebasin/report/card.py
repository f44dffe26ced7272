"""A model card beside every adapter or full model of a run: front matter for the Hub, with measurements as
``model-index``.

Keys of the front matter that are not set here (``license``, ``language``, ...) are the user's and stay as they are.
"""

import itertools
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report import page
from safebasin.report.rates import QUANTITIES, Reading
from safebasin.report.report import Report

FORMS = {"adapter": "A PEFT adapter", "model": "All weights"}  # folder of an arm -> what is in it


def write(run: Path, report: Report) -> None:
    """Write ``arms/<arm>/adapter/README.md`` of every adapter, ``arms/<arm>/model/README.md`` of every full model.

    Raises:
        UserError: the front matter of an existing card cannot be read.
    """
    for arm, form in itertools.product(report.arms, FORMS):
        path = run / "arms" / arm / form / "README.md"
        if path.parent.is_dir():
            text = page.render("card.md", {"report": report, "arm": arm, "form": FORMS[form]})
            data = _filled(report, arm, _front_matter(path))
            data.library_name = "peft" if form == "adapter" else "transformers"
            page.write_text(path, f"---\n{data.to_yaml()}\n---\n{text}")


def _front_matter(path: Path) -> ModelCardData:
    try:
        if path.is_file() and isinstance(data := ModelCard(path.read_text(encoding="utf-8")).data, ModelCardData):
            return data
        return ModelCardData()
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = f"{path}: its front matter cannot be read ({printable(str(error))})"
        raise UserError(f"{reason}; correct it or delete the file") from None


def _filled(report: Report, arm: str, data: ModelCardData) -> ModelCardData:
    """The front matter with the measurements. A reading without a value is left out."""
    methods = [method.split()[0] for training in report.training if training.arm == arm for method in training.methods]
    data.base_model, data.pipeline_tag = report.manifest.get("model"), "text-generation"
    data.tags, data.model_name = ["safebasin", "safety", *methods], f"{report.run}-{arm}"
    data.eval_results = [_result(r) for r in report.readings if r.arm == arm and r.value is not None]
    return data


def _result(reading: Reading) -> EvalResult:
    """Two readings of one quantity and suite, by different judges, differ in their args."""
    name = QUANTITIES.get(reading.quantity, reading.quantity)
    args = ("judge", "n", "low", "high", "unscored", "off_task", "unit")
    return EvalResult(
        task_type="text-generation",
        dataset_type=reading.suite,
        dataset_name=reading.suite,
        metric_type=reading.quantity,
        metric_name=f"{name}, judge {reading.judge}" if reading.judge else name,
        metric_value=reading.value,
        metric_args={arg: getattr(reading, arg) for arg in args},
    )
