"""Metrics: declared in ``metrics``, exported by ``router`` and ``worker``, listed by ``reference``.

Nothing here imports ``prometheus_client`` before it is used: SGLang chooses its multi-process mode
by an environment variable that must be set first (utils/common.py:2825).
"""
