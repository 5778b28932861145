"""The backward of a stage in two parts: first the gradients of its inputs, later those of its weights.

The method serves any module (torch.distributed.pipelining has the same idea): it walks the graph that
autograd recorded. A node on the way from the stage's result to its inputs may have further branches, which
lead to weights only. The first part computes the gradients along the way and keeps those that reach such a
node; the second goes on from there into the branches.

What it costs: all that autograd saved is kept until the second part. An operator that is a
torch.autograd.Function computes its weight gradient in both parts. A block under `pypar.recompute` is computed
again once, in the first part, and kept; a region under torch's activation checkpointing in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradients = tuple[Tensor | None, ...]


@dataclass(eq=False)
class _Branches:
    """Weights, and the nodes on the way from which gradients reach them."""

    weights: list[Tensor]
    nodes: list[Node]


@dataclass
class _Graph:
    """The recorded graph upside down: which nodes hand gradients to a node, and the nodes that hold leaves."""

    givers: dict[Node, list[Node]] = field(default_factory=dict)
    leaves: list[Node] = field(default_factory=list)


class SplitBackward:
    """One stage's backward of one microbatch.

    root: the scalar whose backward it is. inputs: leaves; the gradients of `input_gradients()` are theirs.
    """

    def __init__(self, root: Tensor, inputs: Sequence[Tensor]) -> None:
        self._root: Tensor | None = root
        self._inputs = inputs
        graph = _read(_node(root))
        ends = {get_gradient_edge(x).node for x in inputs}
        way, _ = _upwards(ends, graph, stop=set())
        self._has_way = _node(root) in way
        leaves = [leaf for leaf in graph.leaves if leaf not in ends] if self._has_way else []
        self._branches = _joined(
            _Branches([leaf.variable], _upwards({leaf}, graph, stop=way)[1])  # type: ignore[attr-defined]
            for leaf in leaves
        )
        self._reached: dict[Node, Gradients] = {}

    def input_gradients(self) -> list[Tensor | None]:
        """The gradient of each input, None where the result does not depend on it."""
        if not self._has_way or self._root is None:
            return [None for _ in self._inputs]
        hooks = self._hook(
            (node for branches in self._branches for node in branches.nodes),
            lambda node: partial(self._reached.__setitem__, node),
        )
        try:
            return list(torch.autograd.grad(self._root, self._inputs, retain_graph=True, allow_unused=True))
        finally:
            _remove(hooks)

    def weight_gradients(self) -> None:
        """Adds to the weights' .grad, with their hooks, and lets go of the graph."""
        root, self._root = self._root, None
        if root is not None and not self._has_way:
            root.backward()  # type: ignore[no-untyped-call]
        for branches in self._branches:
            self._descend(branches)
        self._branches, self._reached = [], {}

    def _descend(self, branches: _Branches) -> None:
        nodes = [node for node in branches.nodes if node in self._reached]
        starts = [
            (GradientEdge(node, index), gradient)
            for node in nodes
            for index, gradient in enumerate(self._reached[node])
            if gradient is not None
        ]
        if not starts:
            return
        # A node may also get gradients from another one above it on the way; they are in what it kept.
        hooks = self._hook(nodes, lambda node: lambda _: self._reached[node])
        edges, gradients = zip(*starts, strict=True)
        try:
            torch.autograd.backward(edges, gradients, retain_graph=True, inputs=branches.weights)
        finally:
            _remove(hooks)

    @staticmethod
    def _hook(nodes: Iterable[Node], hook: Callable[[Node], Callable[..., Any]]) -> list[Any]:
        return [node.register_prehook(hook(node)) for node in nodes]


def _node(root: Tensor) -> Node:
    return get_gradient_edge(root).node


def _read(root: Node) -> _Graph:
    graph = _Graph(givers={root: []})
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            graph.leaves.append(node)
        for taker, _ in node.next_functions:
            if taker is not None:
                if taker not in graph.givers:
                    graph.givers[taker] = []
                    waiting.append(taker)
                graph.givers[taker].append(node)
    return graph


def _upwards(start: set[Node], graph: _Graph, stop: set[Node]) -> tuple[set[Node], list[Node]]:
    """All nodes from which `start` is reached without passing `stop`, and those of `stop` that were met."""
    found = {node for node in start if node in graph.givers}
    met: dict[Node, None] = {}
    waiting = list(found)
    while waiting:
        for giver in graph.givers[waiting.pop()]:
            if giver in stop:
                met[giver] = None
            elif giver not in found:
                found.add(giver)
                waiting.append(giver)
    return found, list(met)


def _joined(all_branches: Iterable[_Branches]) -> list[_Branches]:
    """Those that share a node become one: what lies between their nodes and weights belongs to all of them."""
    of_node: dict[Node, _Branches] = {}
    for branches in all_branches:
        joined = branches
        for other in {
            id(of_node[node]): of_node[node] for node in branches.nodes if node in of_node
        }.values():
            joined.weights += other.weights
            joined.nodes += [node for node in other.nodes if node not in joined.nodes]
        of_node.update(dict.fromkeys(joined.nodes, joined))
    return list({id(branches): branches for branches in of_node.values()}.values())


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
