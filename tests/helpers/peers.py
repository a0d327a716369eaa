"""Libraries that are compared with ours, and skipped aloud where they are not installed."""

import importlib
import os
from types import ModuleType

import pytest
import torch


def peer(name: str) -> ModuleType:
    """The imported library, or a skip that names it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    if name in ("timm", "torchvision") and not torch.cuda.is_available():
        _stand_in_operators()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: pip install '.[peers]'")


_libraries: list[torch.library.Library] = []


def _stand_in_operators() -> None:
    """torchvision built for CUDA asks at import for two operators it cannot load beside a torch for the CPU."""
    if not _libraries and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
