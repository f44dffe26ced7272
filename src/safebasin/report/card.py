"""A model card beside every adapter of a run: front matter that the Hub reads, with the measurements as ``model-index``.

Keys of the front matter that are not set here (``license``, ``language``, ...) are the user's: what stands in the file is kept.
"""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report import QUANTITIES, Report, page


def write(run: Path, report: Report) -> None:
    """Write ``arms/<arm>/adapter/README.md`` of every adapter.

    Raises:
        UserError: the front matter of a card that is there cannot be read.
    """
    for arm in report.arms:
        path = run / "arms" / arm / "adapter" / "README.md"
        if path.parent.is_dir():
            page.replace(
                path,
                f"---\n{front(report, arm, kept(path)).to_yaml()}\n---\n{page.render('card.md', {'report': report, 'arm': arm})}",
            )


def kept(path: Path) -> ModelCardData:
    try:
        return ModelCard(path.read_text(encoding="utf-8")).data if path.is_file() else ModelCardData()
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: its front matter cannot be read ({printable(str(error))}); mend it or delete the file"
        ) from None


def front(report: Report, arm: str, data: ModelCardData) -> ModelCardData:
    """What was not measured is not in the index: there is no value for it. Two metrics of one suite and judge differ in their args."""
    methods = [method.split()[0] for training in report.training if training.arm == arm for method in training.methods]
    data.base_model, data.library_name, data.pipeline_tag = report.manifest.get("model"), "peft", "text-generation"
    data.tags, data.model_name = ["safebasin", "safety", *methods], f"{report.run}-{arm}"
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=reading.suite,
            dataset_name=reading.suite,
            metric_type=reading.quantity,
            metric_name=f"{QUANTITIES.get(reading.quantity, reading.quantity)}{reading.judge and f', judge {reading.judge}'}",
            metric_value=reading.value,
            metric_args={
                name: getattr(reading, name) for name in ("judge", "n", "low", "high", "unscored", "off_task", "unit")
            },
        )
        for reading in report.readings
        if reading.arm == arm and reading.value is not None
    ]
    return data
