"""The portable torch platform: real SGLang on a machine without an accelerator.

SGLang calls ``activate`` through the entry-point group ``sglang.srt.platforms`` in every process.
"""

from __future__ import annotations

import os

# Set by the launcher when `--device cpu` is asked for; on a machine with an accelerator SGLang's
# own platform stays otherwise.
FORCE_CPU_VARIABLE = "SYMPHONY_FORCE_CPU_PLATFORM"

PLATFORM_CLASS = "symphony_sglang.platform.cpu:PortableTorchPlatform"


def accelerator_present() -> bool:
    """Whether torch sees a device that SGLang has a platform of its own for."""
    import torch

    if torch.cuda.is_available():
        return True
    return any(
        getattr(torch, name, None) is not None and getattr(torch, name).is_available()
        for name in ("xpu", "npu", "mps")
    )


def activate() -> str | None:
    """``"module:Class"`` of the platform to use, or None to leave SGLang its own choice."""
    if os.environ.get(FORCE_CPU_VARIABLE) != "1" and accelerator_present():
        return None
    from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops

    define_missing_torchvision_ops()
    return PLATFORM_CLASS
