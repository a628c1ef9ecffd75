"""SGLang's platform for any device that torch itself can drive; used on machines without one.

SGLang's in-tree CPU path needs its compiled AMX kernels (srt/utils/common.py:220). This platform
needs torch alone: every capability is left off, so SGLang takes its torch-native allocators and
layers, and attention is ours (``symphony_sglang.platform.attention``).
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from symphony_sglang.platform.attention import BACKEND_NAME, register_attention_backend
from symphony_sglang.platform.support import refuse_unsupported
from symphony_sglang.platform.threads import export_core_shares

# What SGLang picks by itself on x86 and ARM CPUs (arg_groups/platform_hook.py:158); the first needs
# compiled kernels, the second attends from the whole prefix's queries on every extend.
_STOCK_CPU_BACKENDS = (None, "intel_amx")


class PortableTorchPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU driven by torch alone."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """CPU settings that the user did not choose; raises ``UnsupportedError`` by feature.

        Runs in the launching process, while SGLang resolves its arguments.
        """
        refuse_unsupported(server_args)
        if server_args.attention_backend in _STOCK_CPU_BACKENDS:
            server_args.attention_backend = BACKEND_NAME
        server_args.sampling_backend = "pytorch"
        # Overlap hides launch latency behind device streams, which a CPU does not have.
        server_args.disable_overlap_schedule = True
        server_args.disable_custom_all_reduce = True
        # An idle scheduler that polls takes a core from the HTTP process and from other workers.
        # It sleeps on its sockets only when nothing runs and no transfer is under way.
        server_args.sleep_on_idle = True
        export_core_shares(server_args.tp_size * server_args.pp_size * server_args.dp_size)

    def get_default_attention_backend(self) -> str:
        return BACKEND_NAME

    def get_dispatch_key_name(self) -> str:
        """Fused operators take their plain torch form."""
        return "native"

    def init_backend(self) -> None:
        register_attention_backend()

    def get_device(self, device_id: int = 0) -> str:  # type: ignore[override]
        """By name: SGLang splits it (serving_hook.py:658); its CPU mixin returns a torch.device."""
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False
