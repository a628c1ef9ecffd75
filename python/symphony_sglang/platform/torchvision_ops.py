"""Lets transformers import torchvision beside a CPU build of torch.

torchvision's only wheel is compiled for CUDA. Beside a CPU torch its compiled operators do not
load, and importing it fails because it registers fake kernels for operators that do not exist.
Declaring the two schemas it asks for is enough: nothing on the path of a text model calls them.
"""

from __future__ import annotations

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A Library drops its definitions when it is collected, so it is held for the process's life.
_LIBRARIES: list[torch.library.Library] = []


def define_missing_torchvision_ops() -> list[str]:
    """Declare the operators that are missing; returns their names, empty on a CUDA build of torch.

    Call before transformers or SGLang is imported, in every process. Does nothing the second time.
    """
    if _LIBRARIES or torch.version.cuda is not None or torch.version.hip is not None:
        return []
    library = torch.library.Library("torchvision", "FRAGMENT")
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        library.define(_SCHEMAS[name])
    _LIBRARIES.append(library)
    return missing
