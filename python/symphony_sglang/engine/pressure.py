"""How much device memory the queue's head lacks, as SGLang's admission will count it."""

from __future__ import annotations

from typing import Any

# SGLang reserves at most this many output tokens for a request at admission
# (schedule_policy.py, CLIP_MAX_NEW_TOKENS).
OUTPUT_TOKENS_MAX = 4096


def tokens_to_come(request: Any) -> int:
    """Output tokens a request may still produce, as far as admission reserves for them."""
    wanted = request.sampling_params.max_new_tokens or OUTPUT_TOKENS_MAX
    return max(0, min(int(wanted), OUTPUT_TOKENS_MAX) - len(request.output_ids))


def admission_shortfall(scheduler: Any, cache: Any) -> int:
    """Device tokens missing for the first waiting request; 0 or less where it fits.

    Protected prefixes are not counted as evictable by admission (schedule_policy.py:656), so they
    must be let go before it runs. Running requests are counted at their full remaining length: too
    much is let go rather than too little.
    """
    head = scheduler.waiting_queue[0]
    needed = len(head.origin_input_ids) + len(head.output_ids) + tokens_to_come(head)
    running = scheduler.running_batch
    if running is not None:
        needed += sum(tokens_to_come(request) for request in running.reqs)
    needed += cache.page_size * (1 + (0 if running is None else len(running.reqs)))
    free = cache.token_to_kv_pool_allocator.available_size() + cache.full_evictable_size()
    return int(needed - free)
