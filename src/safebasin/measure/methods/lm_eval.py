"""General ability: tasks of EleutherAI's lm-evaluation-harness on the model as it stands in memory, adapter and all.

The task defines its metrics; n is the number of its samples, the interval 1.96 standard errors where the harness gives
them. A task by name fetches its rows; one of ``folder`` (the harness's YAML) may read a local file.
"""

import importlib.util
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from safebasin.data.records import Measurement
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.subject import Subject
from safebasin.models.parts import text_config


@suite("lm_eval")
class LmEval:
    """What the model can do beside the task, by the tasks of lm-evaluation-harness."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]  # of lm-evaluation-harness, by name
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

        manager = TaskManager(include_path=self.folder, include_defaults=True)
        if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
            raise UserError(f"{self.name}: the harness has no task {unknown[0]!r}")
        model, tokenizer = subject.loaded
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            max_length=text_config(model).max_position_embeddings,
        )
        outcome = simple_evaluate(
            wrapped,
            tasks=list(self.tasks),
            limit=self.limit,
            task_manager=manager,
            apply_chat_template=self.chat,
            log_samples=False,
        )
        for task, metrics in outcome["results"].items():
            if task not in outcome["n-samples"]:
                continue  # a group: the mean of tasks that have results of their own
            n = outcome["n-samples"][task]["effective"]
            for key, value in metrics.items():
                metric, _, selection = key.partition(",")  # "acc,none": the filter of the harness
                if not selection or metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{selection}")
                low, high = (value - 1.96 * error, value + 1.96 * error) if isinstance(error, float) else (None, None)
                what = f"{task}.{metric}" + (f".{selection}" if selection != "none" else "")
                yield Measurement(self.name, what, value, low, high, n, 0, unit="")
