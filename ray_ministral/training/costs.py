"""What each layer of a model costs in training on given samples: where to cut it into stages."""

from __future__ import annotations

from collections.abc import Sequence

from ray_ministral.config import Freezable
from ray_ministral.model.architecture import Architecture
from ray_ministral.pipeline.partition import Costs
from ray_ministral.training.targets import TrainSample


def training_costs(
    arch: Architecture, samples: Sequence[TrainSample], freeze: Sequence[Freezable] = (), *, adapters: bool = False
) -> Costs:
    """FLOPs of a step on `samples`.

    A forward pass is two for each parameter and token, plus the attention products; a backward pass as much again for
    the gradient of the input, and again for that of the weights where these are trained. `adapters`: they are not.
    """
    vision = arch.vision
    language = ("language" not in freeze and not adapters) + 2.0
    # The tower is the very first thing: nobody wants the gradient of its input.
    tower = 1.0 if "vision" in freeze else 3.0
    layer = first = 0.0
    for sample in samples:
        tokens = sample.num_tokens
        attention = 2.0 * tokens**2 * arch.num_heads * arch.head_dim
        layer += language * 2.0 * arch.layer_parameters * tokens + 3.0 * attention
        for height, width in sample.image_sizes:
            patches = (height // vision.merged_patch_size) * (width // vision.merged_patch_size) * vision.merge_size**2
            products = 4.0 * patches**2 * vision.hidden_size * vision.num_layers
            first += tower * (2.0 * arch.vision_parameters * patches + products)
    targets = sum(sample.num_targets for sample in samples)
    return Costs((layer,) * arch.num_layers, first, language * 2.0 * arch.embedding_parameters * targets)
