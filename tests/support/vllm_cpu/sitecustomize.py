"""Lets the CPU build of vLLM start beside a CPU build of torch. For tests only.

vLLM depends on torchvision, whose wheel on the package index is built for CUDA. Importing that
beside a CPU torch fails, because two operators that its Python code describes were never
registered by its missing CUDA library. Python runs this file at start-up when its folder is on
PYTHONPATH; just before torchvision is first imported it registers the two schemas, and nothing
else. No code here ever calls the operators.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(name + _NMS)
            _kept.append(library)  # schemas live as long as their library object


sys.meta_path.insert(0, _BeforeTorchvision())
