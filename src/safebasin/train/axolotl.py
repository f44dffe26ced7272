"""Per-token weights in axolotl: its plugin. Written against ``axolotl.integrations.base.BasePlugin`` of 0.19.0.

    plugins: [safebasin.train.axolotl.TokenWeights]
    trainer_cls: safebasin.train.axolotl.WeightedTrainer

The plugin alone would do. But axolotl goes on without a plugin that it cannot import, and stops at a trainer that it
cannot import: with both lines no run is silently without its weights.
"""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin

from safebasin.errors import UserError
from safebasin.train.weighted import WeightedCollator, WeightedLoss

REFUSED = {  # settings that move, merge or lose tokens or losses on their way to the weighted loss
    "sample_packing": "rows must stay single",
    "eval_sample_packing": "rows must stay single",
    "batch_flattening": "rows must stay single",
    "context_parallel_size": "a row must stay on one rank",
    "sequence_parallel_degree": "a row must stay on one rank",
    "rl": "weights are for supervised learning",
}


def __getattr__(name: str) -> Any:
    if name != "WeightedTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl.core.trainers.base import AxolotlTrainer  # late: axolotl patches what it imports

    return type(name, (WeightedLoss, AxolotlTrainer), {"__module__": __name__})


class TokenWeights(BasePlugin):
    """Weighs the loss of a set that ``safebasin convert --as tokens --weights SCORER`` wrote."""

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Called with the configuration as it stands in the file.

        Raises:
            UserError: a setting under which the weights would not stand beside their tokens.
        """
        for key, why in REFUSED.items():
            if str(cfg.get(key)) not in ("None", "False", "1"):
                raise UserError(f"{key}: {cfg[key]!r} cannot be used with per-token weights: {why}; leave it out")

    def get_trainer_cls(self, cfg: Any) -> Any:
        return __getattr__("WeightedTrainer")

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"remove_unused_columns": False}

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> tuple[type, dict[str, Any]]:
        return WeightedCollator, {}
