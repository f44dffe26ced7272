"""General ability: tasks of EleutherAI's lm-evaluation-harness on the model as it stands in memory, adapter and all.

What a metric is, is the task's own; n is the number of its samples, the interval 1.96 standard errors where the harness tells one. A task by name
fetches its rows; one of ``folder`` (the harness's YAML) may read a local file.
"""

import importlib.util
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from safebasin.data.records import Measurement
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.subject import Subject


@suite("lm_eval")
class LmEval:
    """What the model can do beside the task, by the tasks of lm-evaluation-harness."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    folder: str | None = None  # of tasks of your own
    limit: PositiveInt | None = None  # samples a task
    batch_size: PositiveInt = 8
    chat: bool = False  # ask through the chat template
    name: str = "lm_eval"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("the suite lm_eval needs lm-eval, which is not installed: it is the extra 'lm-eval'")

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        known = TaskManager(include_path=self.folder, include_defaults=True)
        if odd := [task for task in self.tasks if task not in known.all_tasks]:
            raise UserError(f"{self.name}: the harness has no task {odd[0]!r}")
        model, tokenizer = subject.loaded
        asked = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            max_length=model.config.max_position_embeddings,
        )
        told = simple_evaluate(
            asked,
            tasks=list(self.tasks),
            limit=self.limit,
            task_manager=known,
            apply_chat_template=self.chat,
            log_samples=False,
        )
        for task, metrics in told["results"].items():
            if task not in told["n-samples"]:
                continue  # a group: the mean of tasks that are told
            n = told["n-samples"][task]["effective"]
            for key, value in metrics.items():
                metric, _, kept = key.partition(",")
                if not kept or metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{kept}")
                low, high = (value - 1.96 * error, value + 1.96 * error) if isinstance(error, float) else (None, None)
                yield Measurement(
                    self.name,
                    f"{task}.{metric}" + (f".{kept}" if kept != "none" else ""),
                    value,
                    low,
                    high,
                    n,
                    0,
                    unit="",
                )
