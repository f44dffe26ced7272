"""The records that the stages leave in files: what one line of each holds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A number with what one needs to trust it. ``value`` is None where nothing could be scored: never a zero."""

    suite: str
    what: str
    value: float | None
    low: float | None  # 95 % interval
    high: float | None
    n: int  # scored prompts
    unscored: int = 0
    off_task: int = 0
    unit: str = "share"
    judge: str = ""
    category: str = ""
    evidence: str = ""  # the file of answers that it was counted from
