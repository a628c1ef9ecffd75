"""Workloads: a model to serve, traces to replay, and conversations to run against a live server.

- ``tiny_model``, ``tiny_tokenizer``: a loadable Llama with random weights, made locally.
- ``traces``, ``trace_formats``: published traces as typed sessions and turns.
- ``prompts``: token ids for traces that give block ids, and what of a session is sent.
- ``replay``, ``replay_driver``, ``replay_report``: a trace against a server.
- ``generate_client``: one ``/generate`` request, measured.
- ``worker_process``: a server as a child process that leaves nothing behind.
- ``conversation``, ``demo``: multi-turn sessions that overflow the device level and return.

Nothing here imports SGLang: what is measured is what any client sees. Modules with a command import
their heavy parts when the command runs, so that ``symphony --help`` stays quick.
"""
