"""Python reads this at the start of every process of the vLLM peer: lets a torchvision be imported that fits no torch.

vLLM's image processors import torchvision. PyPI has it for CUDA only; beside a torch for CPU that build ends its own
import at the first of its operators that is not there. Here they are declared; none of them is used for captions. Where
torchvision is a build for CPU too, nothing is done.
"""

from importlib.metadata import PackageNotFoundError, version

DETECTION_OPERATORS = ("nms", "qnms")


def _build(package: str) -> str:
    """What follows the + in a version."""
    try:
        return version(package).partition("+")[2]
    except PackageNotFoundError:
        return ""


if _build("torch") == "cpu" and _build("torchvision") != "cpu":
    import torch

    LIBRARY = torch.library.Library("torchvision", "DEF")  # declared as long as this lives
    for name in DETECTION_OPERATORS:
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
