"""Prefix cache: keys and values of earlier prompts, for later prompts with the same beginning.

Each model and client has a radix tree of token ids, as in SGLang's RadixAttention (Zheng et al.
2023, arXiv:2312.07104), so shared beginnings are stored once. Clients do not share trees, because
the time to a first token would reveal prompts of another client. Replies are not cached.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from luthier.models.decoding.backends import FEWEST_SHARED, common_length

if TYPE_CHECKING:
    from luthier.inference.memory import CacheBudget
    from luthier.models.decoding.kv_cache import KeyValues
    from luthier.types import IntArray

MAX_NODES = 4096
"""Maximum number of nodes of all trees."""

Key = tuple[Hashable, str]
"""A model and a client."""


@dataclass(eq=False)
class _Node:
    """Tokens after the tokens of ``parent``."""

    ids_T: IntArray
    key_values: KeyValues | None
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    used: int = 0
    """Clock value of the last look-up through the node."""

    @property
    def nbytes(self) -> int:
        """Bytes of the node's keys and values."""
        return 0 if self.key_values is None else self.key_values.nbytes


class PrefixCache:
    """Keys and values of prompts, in ``share`` of a budget, while no request needs the memory.

    The client with the most bytes loses the prompt with the longest time unused first. Safe to
    share between threads.
    """

    def __init__(self, memory: CacheBudget, share: float = 0.5) -> None:
        self._memory, self._most = memory, int(share * memory.total)
        self._roots: dict[Key, _Node] = {}
        self._bytes: dict[Key, int] = {}
        self._clock = itertools.count(1)
        self._lock = threading.Lock()
        memory.on_shortage(self.reclaim)

    @property
    def nbytes(self) -> int:
        """Bytes of all cached keys and values."""
        with self._lock:
            return sum(self._bytes.values())

    def longest(self, model: Hashable, client: str, ids_T: IntArray) -> KeyValues | None:
        """Return keys and values of the longest cached prefix of ``ids_T`` without its last token."""
        with self._lock:
            # The last token is always computed: its logits choose the first token of the reply.
            path = [*self._path((model, client), ids_T[:-1])]
            if sum(shared for _, shared in path) < FEWEST_SHARED:
                return None
            parts = [node.key_values.first(shared) for node, shared in path if node.key_values]
            return parts[0].concat(parts[1:])

    def add(
        self, model: Hashable, client: str, ids_T: IntArray, copy: Callable[[int], KeyValues]
    ) -> None:
        """Cache a prompt; ``copy`` returns the keys and values from a given token."""
        key = model, client
        with self._lock:
            path = [*self._path(key, ids_T)]
            cached = sum(count for _, count in path)
            if len(ids_T) - cached < FEWEST_SHARED:
                return
            new = copy(cached)
            if not self._make_room(new.nbytes, {each for each, _ in path}):
                return
            # After `_make_room`, whose evictions may remove an empty root.
            root = self._roots.setdefault(key, _Node(ids_T[:0], None))
            node, shared = path[-1] if path else (root, 0)
            if shared < len(node.ids_T):
                node = self._split(node, shared)
            # A copy of the ids: a view would keep the whole prompt in memory.
            child = _Node(ids_T[cached:].copy(), new, node, used=next(self._clock))
            node.children[int(child.ids_T[0])] = child
            self._bytes[key] = self._bytes.get(key, 0) + new.nbytes

    def forget(self, model: Hashable) -> None:
        """Remove the prompts of a model."""
        with self._lock:
            for key in [key for key in self._roots if key[0] == model]:
                del self._roots[key]
                self._memory.release_spare(self._bytes.pop(key, 0))

    def reclaim(self, size: int) -> None:
        """Free ``size`` bytes, or all bytes if fewer are cached."""
        with self._lock:
            evictions = self._evictions(set())
            while size > 0 and (freed := next(evictions, 0)):
                size -= freed

    def _path(self, key: Key, ids_T: IntArray) -> Iterator[tuple[_Node, int]]:
        """Yield the nodes on the path of ``ids_T``, with the number of equal tokens in each node."""
        node, now = self._roots.get(key), next(self._clock)
        while node is not None and len(ids_T):
            node = node.children.get(int(ids_T[0]))
            if node is None:
                return
            node.used, shared = now, common_length(node.ids_T, ids_T)
            yield node, shared
            if shared < len(node.ids_T):
                return
            ids_T = ids_T[shared:]

    def _split(self, node: _Node, at: int) -> _Node:
        assert node.parent is not None and node.key_values is not None
        # Both parts are copies with the bytes of the whole, so the reserved memory stays correct.
        first, rest = node.key_values.split(at)
        upper = _Node(node.ids_T[:at], first, node.parent, used=node.used)
        node.parent.children[int(node.ids_T[0])] = upper
        node.ids_T, node.key_values, node.parent = node.ids_T[at:], rest, upper
        upper.children[int(node.ids_T[0])] = node
        return upper

    def _make_room(self, size: int, path: set[_Node]) -> bool:
        """Reserve ``size`` bytes for a node without evicting nodes of ``path``; return False on
        failure."""
        if size > self._most:
            return False
        # The new node will be a child of the path, so no node of the path may go.
        nodes, evictions = sum(1 for _ in self._nodes()), self._evictions(path)
        while (
            nodes >= MAX_NODES
            or sum(self._bytes.values()) + size > self._most
            or not self._memory.reserve_spare(size)
        ):
            if not next(evictions, 0):
                return False
            nodes -= 1
        return True

    def _evictions(self, path: set[_Node]) -> Iterator[int]:
        """Evict a leaf per iteration and yield the freed bytes."""
        # A single search for all evictions, because concurrent requests wait for the lock.
        leaves: dict[Key, list[tuple[int, int, _Node]]] = {}
        numbers = itertools.count()  # breaks ties of equal use
        for key, node in self._nodes():
            if not node.children and node not in path:
                heappush(leaves.setdefault(key, []), (node.used, next(numbers), node))
        while leaves:
            key = max(leaves, key=lambda key: self._bytes[key])
            *_, oldest = heappop(leaves[key])
            parent = oldest.parent
            assert parent is not None
            del parent.children[int(oldest.ids_T[0])]
            self._bytes[key] -= oldest.nbytes
            # The parent may be a leaf now. Roots have no keys and values, and go below.
            if parent.parent is not None and not parent.children and parent not in path:
                heappush(leaves[key], (parent.used, next(numbers), parent))
            if not leaves[key]:
                del leaves[key]
            if not self._roots[key].children:
                del self._roots[key], self._bytes[key]
            self._memory.release_spare(oldest.nbytes)
            yield oldest.nbytes

    def _nodes(self) -> Iterator[tuple[Key, _Node]]:
        for key, root in self._roots.items():
            pending = [*root.children.values()]
            while pending:
                node = pending.pop()
                yield key, node
                pending += node.children.values()
