"""SGLang with a session's KV cache in place before its next turn arrives.

The package's map is in ``docs/architecture.md``. Importing it loads nothing heavy: torch and SGLang
come in through ``symphony_sglang.launch_server`` or SGLang's own plugin entry points.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
