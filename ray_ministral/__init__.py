"""Caption and fine-tune Ministral 3 vision-language models on any Ray cluster.

The public names are imported when first asked for: `import ray_ministral` loads neither torch, Ray nor megatron-core,
so that a command line can answer `--help` at once and a driver process stays small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_ministral.config import CaptionConfig as CaptionConfig
    from ray_ministral.config import EvalConfig as EvalConfig
    from ray_ministral.config import ImageLimits as ImageLimits
    from ray_ministral.config import OptimizerConfig as OptimizerConfig
    from ray_ministral.config import PipelineConfig as PipelineConfig
    from ray_ministral.config import PromptConfig as PromptConfig
    from ray_ministral.config import SampleConfig as SampleConfig
    from ray_ministral.config import SamplingConfig as SamplingConfig
    from ray_ministral.config import TrainConfig as TrainConfig
    from ray_ministral.driver.captioner import caption as caption
    from ray_ministral.driver.summary import CaptionSummary as CaptionSummary
    from ray_ministral.driver.trainer import train as train
    from ray_ministral.model.ministral3 import Ministral3Model as Ministral3Model

__version__ = "0.1.0"

# Public name -> the module that owns it.
_HOMES = {
    "CaptionConfig": "ray_ministral.config",
    "CaptionSummary": "ray_ministral.driver.summary",
    "EvalConfig": "ray_ministral.config",
    "ImageLimits": "ray_ministral.config",
    "Ministral3Model": "ray_ministral.model.ministral3",
    "OptimizerConfig": "ray_ministral.config",
    "PipelineConfig": "ray_ministral.config",
    "PromptConfig": "ray_ministral.config",
    "SampleConfig": "ray_ministral.config",
    "SamplingConfig": "ray_ministral.config",
    "TrainConfig": "ray_ministral.config",
    "caption": "ray_ministral.driver.captioner",
    "train": "ray_ministral.driver.trainer",
}

__all__ = [
    "CaptionConfig",
    "CaptionSummary",
    "EvalConfig",
    "ImageLimits",
    "Ministral3Model",
    "OptimizerConfig",
    "PipelineConfig",
    "PromptConfig",
    "SampleConfig",
    "SamplingConfig",
    "TrainConfig",
    "__version__",
    "caption",
    "train",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for.

    Raises:
        AttributeError: the package has no such public name.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
