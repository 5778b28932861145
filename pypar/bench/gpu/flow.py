"""Which way through a kernel's main loop is the hot one."""

from __future__ import annotations

from collections.abc import Iterator

from pypar.bench.gpu.machine_code import Instruction, is_tensor


class Flow:
    """Basic blocks of a kernel and which follow which."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        index = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.target in index:
                starts |= {i + 1, index[instruction.target]}
            elif instruction.opcode.split(".")[0] in ("EXIT", "RET", "BRX"):
                starts.add(i + 1)
        self.starts = sorted(start for start in starts if start < len(code))
        ends = [*self.starts[1:], len(code)]
        self.blocks = {start: code[start:end] for start, end in zip(self.starts, ends, strict=True)}
        self.successors = {s: self._following(s, e, index) for s, e in zip(self.starts, ends, strict=True)}

    def _following(self, start: int, end: int, index: dict[int, int]) -> list[int]:
        last = self.code[end - 1]
        following = [index[last.target]] if last.target in index else []
        leaves = last.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "BRA")
        if end < len(self.code) and (last.guarded or not leaves):
            following.append(end)
        return following

    def loops(self) -> Iterator[tuple[int, set[int]]]:
        """(head, blocks) of every loop: the blocks from which a branch back to the head can be reached without it."""
        before: dict[int, list[int]] = {start: [] for start in self.starts}
        for start, following in self.successors.items():
            for other in following:
                before[other].append(start)
        for tail, following in self.successors.items():
            for head in (other for other in following if other <= tail):
                inside, waiting = {head}, [tail]
                while waiting:
                    block = waiting.pop()
                    if block not in inside:
                        inside.add(block)
                        waiting += before[block]
                yield head, inside

    def hot_path(self) -> list[Instruction]:
        """One turn of the innermost loop with tensor-core instructions; empty without such a loop."""
        candidates = [
            (len(inside), head, inside)
            for head, inside in self.loops()
            if any(is_tensor(i) for block in inside for i in self.blocks[block])
        ]
        if not candidates:
            return []
        _, head, inside = min(candidates, key=lambda c: c[:2])
        # Blocks lie in the order of their addresses; a branch back inside is another loop and is not taken.
        best: dict[int, tuple[int, int, list[int]]] = {head: self._score(head, (0, 0, []))}
        ends = []
        for block in sorted(inside):
            if block not in best:
                continue
            for other in self.successors[block]:
                if other == head:
                    ends.append(best[block])
                elif other in inside and other > block:
                    score = self._score(other, best[block])
                    if other not in best or score[:2] > best[other][:2]:
                        best[other] = score
        path = max(ends, key=lambda score: score[:2])[2]
        return [instruction for block in path for instruction in self.blocks[block]]

    def _score(self, block: int, before: tuple[int, int, list[int]]) -> tuple[int, int, list[int]]:
        tensor = sum(map(is_tensor, self.blocks[block]))
        others = len(self.blocks[block]) - tensor
        return before[0] + tensor, before[1] - others, [*before[2], block]
