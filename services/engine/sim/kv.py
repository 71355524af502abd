"""The simulated KV pool: slots, what is in them, and the prefix tree over them, with locks and LRU eviction.

A slot is free, in the tree (locked or evictable), or owned by whoever was given it. Slots are rows 1 to `total`; 0 is
padding, as in real pools.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvmesh.blocks import BLOCK_TOKENS, block_hashes
from kvmesh.dataplane.slots import Slots
from kvmesh.sim.peers import Values
from services.engine.sim.content import UNWRITTEN, Ids

# Slots as the tree keeps them: half the memory, which is most of what a simulation needs.
Places: TypeAlias = "npt.NDArray[np.int32] | Slots"


class Node:
    """A stretch of tokens in the tree. `blocks`: hashes of the blocks that end in it, when blocks are watched."""

    __slots__ = ("blocks", "children", "locks", "parent", "slots", "stamp", "start", "tokens")

    def __init__(self, parent: Node | None, start: int, tokens: Ids, slots: Places) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.stamp = 0
        self.blocks: list[int] = []

    @property
    def end(self) -> int:
        """Tokens from the root to the end of this stretch."""
        return self.start + len(self.tokens)


def _common(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n


class KvCache:
    """Pool and tree. `on_change(stored, removed)` tells of blocks once `watch` was called."""

    def __init__(self, total: int) -> None:
        self.total = total
        # calloc'ed: takes memory only where it was used.
        self.values: Values = np.zeros(total + 1, np.uint64)
        self.free = total
        # In the tree: in nobody's use, and locked.
        self.cached = 0
        self.locked = 0
        self.on_change: Callable[[Sequence[int], Sequence[int]], None] | None = None
        self._fresh = 1
        self._returned: list[Places] = []
        self._ticks = itertools.count(1)
        self._heap: list[tuple[int, int, Node]] = []
        self._root = Node(None, 0, np.empty(0, np.uint32), np.empty(0, np.int64))
        self._nodes = 0

    @property
    def room(self) -> int:
        """Slots that `alloc` can give."""
        return self.free + self.cached

    def alloc(self, count: int) -> Slots | None:
        """Slots for `count` tokens, evicting what is least recently used; None if there are not so many."""
        if count > self.room:
            return None
        if count > self.free:
            self._evict(count - self.free)
        parts: list[Places] = []
        need = count
        while need and self._returned:
            last = self._returned.pop()
            if len(last) > need:
                self._returned.append(last[need:])
                last = last[:need]
            parts.append(last)
            need -= len(last)
        if need or not parts:
            parts.append(np.arange(self._fresh, self._fresh + need, dtype=np.int64))
            self._fresh += need
        self.free -= count
        slots: Slots = np.concatenate(parts, dtype=np.int64)
        self.values[slots] = UNWRITTEN
        return slots

    def release(self, slots: Places) -> None:
        """Owned slots come back."""
        if len(slots):
            self._returned.append(slots)
            self.free += len(slots)

    def match(self, ids: Ids) -> tuple[Node, Slots]:
        """The deepest node that is a prefix of `ids`, split where need be, and the slots up to it."""
        node, at = self._root, 0
        parts: list[Places] = []
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            same = _common(child.tokens, ids[at:])
            if same < len(child.tokens):
                child = self._split(child, same)
            parts.append(child.slots)
            at += same
            node = child
        return node, np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)

    def _split(self, node: Node, at: int) -> Node:
        """Makes the first `at` tokens of `node` a node of their own, and returns it; `node` is the rest."""
        assert node.parent is not None
        front = Node(node.parent, node.start, node.tokens[:at], node.slots[:at])
        front.locks, front.stamp = node.locks, node.stamp
        whole = front.end // BLOCK_TOKENS - node.start // BLOCK_TOKENS
        front.blocks, node.blocks = node.blocks[:whole], node.blocks[whole:]
        front.children[int(node.tokens[at])] = node
        node.parent.children[int(node.tokens[0])] = front
        self._nodes += 1
        node.parent, node.start = front, front.end
        node.tokens, node.slots = node.tokens[at:], node.slots[at:]
        return front

    def insert(self, ids: Ids, slots: Slots) -> tuple[Node, int]:
        """Puts `ids` into the tree: (node at their end, how many were there before).

        Slots of what is new are the tree's now; those of what was there before are still the caller's.
        """
        node, there = self.match(ids)
        known = len(there)
        if known == len(ids):
            return node, known
        leaf = Node(node, known, ids[known:].copy(), slots[known:].astype(np.int32))
        node.children[int(ids[known])] = leaf
        self._nodes += 1
        leaf.stamp = next(self._ticks)
        self.cached += len(leaf.tokens)
        self._push(leaf)
        if self.on_change is not None:
            whole = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
            leaf.blocks = _hashes(ids[:whole])[known // BLOCK_TOKENS :]
            if leaf.blocks:
                self.on_change(leaf.blocks, ())
        return leaf, known

    def lock(self, node: Node) -> None:
        """Keeps the path to `node` until `unlock`."""
        stamp = next(self._ticks)
        step: Node | None = node
        while step is not None and step.parent is not None:
            if not step.locks:
                self.cached -= len(step.tokens)
                self.locked += len(step.tokens)
            step.locks += 1
            step.stamp = stamp
            step = step.parent

    def unlock(self, node: Node) -> None:
        """The end of one `lock`."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            step.locks -= 1
            if not step.locks:
                self.cached += len(step.tokens)
                self.locked -= len(step.tokens)
                self._push(step)
            step = step.parent

    def _push(self, node: Node) -> None:
        if not node.children and node.parent is not None and not node.locks:
            heapq.heappush(self._heap, (node.stamp, next(self._ticks), node))
            if len(self._heap) > 4 * self._nodes + 64:
                # Most entries are of nodes that were used again since.
                self._heap = [e for e in self._heap if self._evictable(*e)]
                heapq.heapify(self._heap)

    @staticmethod
    def _evictable(stamp: int, _number: int, node: Node) -> bool:
        return node.stamp == stamp and not node.children and not node.locks and node.parent is not None

    def _evict(self, count: int) -> None:
        removed: list[int] = []
        while count > 0:
            entry = heapq.heappop(self._heap)
            node, parent = entry[2], entry[2].parent
            if parent is None or not self._evictable(*entry):
                continue
            del parent.children[int(node.tokens[0])]
            node.parent = None
            self._nodes -= 1
            self.cached -= len(node.slots)
            count -= len(node.slots)
            self.release(node.slots)
            removed += node.blocks
            self._push(parent)
        if removed and self.on_change is not None:
            self.on_change((), removed)

    def flush(self) -> bool:
        """Empties the tree; False, and nothing done, while anything of it is locked."""
        if self.locked:
            return False
        self._evict(self.cached)
        self._heap.clear()
        return True

    def watch(self, on_change: Callable[[Sequence[int], Sequence[int]], None]) -> list[int]:
        """Begins to tell of blocks; those there are now."""
        if self.on_change is None:
            for node, ids in self._paths(self._root, np.empty(0, np.uint32)):
                whole = node.end // BLOCK_TOKENS * BLOCK_TOKENS
                node.blocks = _hashes(ids[:whole])[node.start // BLOCK_TOKENS :]
        self.on_change = on_change
        return [block for node, _ in self._paths(self._root, np.empty(0, np.uint32)) for block in node.blocks]

    def _paths(self, node: Node, ids: Ids) -> Iterator[tuple[Node, Ids]]:
        ahead = [(node, ids)]
        while ahead:
            at, before = ahead.pop()
            path = np.concatenate((before, at.tokens))
            yield at, path
            ahead += [(child, path) for child in at.children.values()]


def _hashes(ids: Ids) -> list[int]:
    return block_hashes(ids.astype(np.int64).tolist())
