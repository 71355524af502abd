"""The prefix cache: SGLang's radix tree, which also knows of reserved slots and tells what comes and goes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from kvmesh.blocks import BLOCK_TOKENS, block_hashes


class MeshRadixCache(RadixCache):  # type: ignore[misc]
    """`held` slots belong to reservations: neither free nor in the tree."""

    def __init__(self, params: Any) -> None:
        self.held = 0
        # Called with (hashes stored, hashes removed, whether everything else is gone).
        self.on_change: Callable[[list[int], list[int], bool], None] | None = None
        super().__init__(params)

    def session_held_tokens(self, active_pool_idxs: set[int] | None = None) -> int:
        """Slots that SGLang's leak check is not to look for elsewhere."""
        return int(super().session_held_tokens(active_pool_idxs)) + self.held

    def match(self, ids: Any, end: int) -> tuple[Any, TreeNode]:
        """(slots of the longest cached prefix of ids[:end], its node)."""
        found = self.match_prefix(MatchPrefixParams(key=RadixKey(ids[:end], None)))
        return found.device_indices, found.last_device_node

    def lock(self, node: TreeNode) -> TreeNode:
        """Keeps the path to `node` from eviction until `unlock`."""
        self.inc_lock_ref(node)
        return node

    def unlock(self, node: TreeNode) -> None:
        """The end of one `lock`."""
        self.dec_lock_ref(node)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        if self.on_change is not None:
            self.on_change([], [], True)

    def insert(self, params: InsertParams) -> InsertResult:
        """As it was; then tells of the blocks that are new."""
        result = super().insert(params)
        if self.on_change is not None and params.key.extra_key is None:
            length = len(params.key) // self.page_size * self.page_size
            known = result.prefix_len // BLOCK_TOKENS
            if length // BLOCK_TOKENS > known:
                self.on_change(block_hashes(params.key.token_ids[:length])[known:], [], False)
        return result

    def _record_remove_event(self, node: TreeNode, medium: Any = None) -> None:
        super()._record_remove_event(node, medium)
        if self.on_change is not None and (gone := self._blocks_of(node)):
            self.on_change([], gone, False)

    def _blocks_of(self, node: TreeNode) -> list[int]:
        """Hashes of the blocks that end inside `node`."""
        keys = [_tokens(node)]
        above = node.parent
        while above is not None and above is not self.root_node:
            keys.append(_tokens(above))
            above = above.parent
        before = sum(map(len, keys[1:]))
        if (before + len(keys[0])) // BLOCK_TOKENS == before // BLOCK_TOKENS or node.key.extra_key is not None:
            return []
        path = [token for key in reversed(keys) for token in key]
        return block_hashes(path)[before // BLOCK_TOKENS :]

    def hottest(self, count: int) -> list[tuple[list[int], float]]:
        """(token ids, time of last use) of the `count` contexts used last, latest first; none begins another."""
        leaves: list[TreeNode] = []
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            elif node.key.extra_key is None:
                leaves.append(node)
        latest = heapq.nlargest(count, leaves, key=lambda node: node.last_access_time)
        return [(self._path(node), float(node.last_access_time)) for node in latest]

    def _path(self, node: TreeNode) -> list[int]:
        """All token ids from the root to the end of `node`."""
        keys = []
        while node is not self.root_node:
            keys.append(_tokens(node))
            node = node.parent
        return [token for key in reversed(keys) for token in key]

    def blocks(self) -> list[int]:
        """Hashes of all blocks in the tree."""
        hashes: list[int] = []
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            hashes.extend(self._blocks_of(node))
            stack.extend(node.children.values())
        return hashes


def _tokens(node: TreeNode) -> Any:
    return node.key.token_ids[: len(node.key)]


def factory(context: Any) -> MeshRadixCache:
    """For SGLang's registry of caches. Raises ValueError for a model whose KV is not plain attention's."""
    if (
        context.is_hybrid_swa
        or context.is_hybrid_ssm
        or context.enable_hierarchical_cache
        or context.disable_radix_cache
    ):
        raise ValueError("kvmesh serves models with plain attention, with the radix cache on and HiCache off")
    return MeshRadixCache(context.params)
