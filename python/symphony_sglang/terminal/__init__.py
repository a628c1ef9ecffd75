"""``symphony chat``, ``advise``, ``session`` and ``top``: the system seen from a terminal."""
