"""Prompts of tests that compare greedy outputs: mixed lengths, some sharing prefixes."""

from __future__ import annotations

import random


def mixed_prompts(count: int, *, seed: int, vocab: int, longest: int = 900) -> list[list[int]]:
    """`count` prompts of 5 to `longest` tokens; every third one extends an earlier one."""
    generator = random.Random(seed)
    prompts: list[list[int]] = []
    for index in range(count):
        length = generator.choice((5, 17, 64, 130, 300, 600, longest))
        fresh = [generator.randrange(300, vocab) for _ in range(length)]
        if index % 3 == 2:
            base = generator.choice(prompts)
            fresh = (base[: generator.randrange(1, len(base) + 1)] + fresh)[:longest]
        prompts.append(fresh)
    return prompts
