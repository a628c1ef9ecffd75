"""An approximate radix tree over routed prompts: what `cache_aware` believes each worker to hold.

It is never told what workers evict; that is the weakness of the policy, kept for comparison and
for workers that publish nothing. Bounded by characters for each worker and by bytes in all; beyond
either, the leaves longest unused go.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

NODE_BYTES = 600  # node, its two dicts and their slots, roughly


class Node:
    """An edge's text, what follows, and when each worker was last sent something through here."""

    __slots__ = ("children", "parent", "text", "workers")

    def __init__(self, text: str, parent: Node | None) -> None:
        self.text = text
        self.parent = parent
        self.children: dict[str, Node] = {}
        self.workers: dict[str, int] = {}


class PrefixTree:
    """Text prefixes by worker. Time is a count of calls, so equal runs give equal trees."""

    def __init__(self, characters_max: int, bytes_max: int) -> None:
        assert characters_max > 0 < bytes_max, (characters_max, bytes_max)
        self.characters_max = characters_max
        self.bytes_max = bytes_max
        self.characters: dict[str, int] = {}  # worker -> characters in its part of the tree
        self.bytes = 0
        self.evicted = 0
        self._root = Node("", None)
        self._calls = 0

    def match(self, text: str) -> tuple[int, str | None]:
        """Characters of the longest known head of `text`, and who was last sent it."""
        node, place = self._root, 0
        best: str | None = None
        while place < len(text):
            child = node.children.get(text[place])
            if child is None:
                break
            common = common_characters(child.text, text, place)
            place += common
            node = child
            if common < len(child.text):
                break
        if node is not self._root and node.workers:
            best = max(node.workers, key=lambda worker: node.workers[worker])
        return (place if best is not None else 0), best

    def insert(self, text: str, worker_id: str) -> None:
        """`text` was routed to `worker_id`."""
        self._calls += 1
        self.characters.setdefault(worker_id, 0)
        node, place = self._root, 0
        while place < len(text):
            child = node.children.get(text[place])
            if child is None:
                child = Node(text[place:], node)
                node.children[text[place]] = child
                self.bytes += NODE_BYTES + len(child.text)
            else:
                common = common_characters(child.text, text, place)
                if common < len(child.text):
                    child = self._split(child, common)
            if worker_id not in child.workers:
                self.characters[worker_id] += len(child.text)
            child.workers[worker_id] = self._calls
            place += len(child.text)
            node = child
        if self.bytes > self.bytes_max or self.characters[worker_id] > self.characters_max:
            self.evict()

    def _split(self, child: Node, length: int) -> Node:
        """A new node for the first `length` characters of `child`, above it."""
        assert child.parent is not None
        upper = Node(child.text[:length], child.parent)
        upper.workers = dict(child.workers)
        child.parent.children[upper.text[0]] = upper
        child.text = child.text[length:]
        child.parent = upper
        upper.children[child.text[0]] = child
        self.bytes += NODE_BYTES
        return upper

    def evict(self) -> None:
        """Cut back to 9/10 of the bounds, what was used longest ago first. O(nodes)."""
        wanted = self.characters_max * 9 // 10
        for worker_id in [w for w, size in self.characters.items() if size > self.characters_max]:
            self._cut(worker_id, wanted)
        if self.bytes > self.bytes_max:
            self._cut(None, self.bytes_max * 9 // 10)

    def _cut(self, worker_id: str | None, wanted: int) -> None:
        """Take a worker (None: all of them) off leaves until what it has, or the tree, fits."""
        leaves = [
            (self._age(node, worker_id), number, node)
            for number, node in enumerate(self._nodes())
            if self._is_leaf(node, worker_id)
        ]
        heapq.heapify(leaves)
        number = len(leaves)
        while leaves and (self.bytes if worker_id is None else self.characters[worker_id]) > wanted:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            for one in list(node.workers) if worker_id is None else [worker_id]:
                del node.workers[one]
                self.characters[one] -= len(node.text)
            self.evicted += 1
            self._prune(node)
            if parent is not self._root and self._is_leaf(parent, worker_id):
                number += 1
                # Numbers of the first listing may be equal: ages differ or the order is free.
                heapq.heappush(leaves, (self._age(parent, worker_id), -number, parent))

    @staticmethod
    def _age(node: Node, worker_id: str | None) -> int:
        return max(node.workers.values()) if worker_id is None else node.workers[worker_id]

    @staticmethod
    def _is_leaf(node: Node, worker_id: str | None) -> bool:
        if worker_id is None:
            return not node.children and bool(node.workers)
        held = any(worker_id in child.workers for child in node.children.values())
        return worker_id in node.workers and not held

    def _prune(self, node: Node) -> None:
        """Remove a node that no worker has, and nothing follows."""
        if not node.workers and not node.children and node.parent is not None:
            del node.parent.children[node.text[0]]
            self.bytes -= NODE_BYTES + len(node.text)

    def forget_worker(self, worker_id: str) -> None:
        if worker_id in self.characters:
            self._cut(worker_id, 0)
            del self.characters[worker_id]

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check(self) -> None:
        """Sizes equal those counted anew, and a worker of a node is one of its parent."""
        characters = dict.fromkeys(self.characters, 0)
        size = 0
        for node in self._nodes():
            assert node.text
            assert node.workers
            parent = node.parent
            assert parent is not None
            assert parent.children[node.text[0]] is node
            assert parent is self._root or set(node.workers) <= set(parent.workers)
            size += NODE_BYTES + len(node.text)
            for worker_id in node.workers:
                characters[worker_id] += len(node.text)
        assert characters == self.characters
        assert size == self.bytes


def common_characters(edge: str, text: str, place: int) -> int:
    """How many characters `edge` has in common with `text` from `place` on."""
    if text.startswith(edge, place):
        return len(edge)
    low, high = 0, min(len(edge), len(text) - place)
    while low < high:  # slices compare at the speed of memory
        middle = (low + high + 1) >> 1
        if text.startswith(edge[low:middle], place + low):
            low = middle
        else:
            high = middle - 1
    return low
