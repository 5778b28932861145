"""The loss over a large vocabulary without its logits: those of one chunk of tokens at a time.

For a chunk, `measure` multiplies it by the weight, block by block of the vocabulary, and finds what the rows'
softmax needs; `differentiate` turns each block of logits into its gradient, in place, and multiplies that into the
gradients of hidden and weight. Products are fp32 (fp64 for fp64), and so are the sums over blocks and chunks.

On a CPU the operands of products are converted to fp32, block by block of the weight. A GPU has a rate for operands of
16 bits that is many times that of fp32, and gives their products in fp32: there operands stay in the inputs' dtype, a
block is the whole vocabulary, and the logits' gradient, made in fp32 from logits in fp32, is rounded once to be an
operand of the other two products, as it is in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pypar.ops.linear_cross_entropy.rows import Block, Coefficients, LossBackend
from pypar.ops.rows import accumulate_dtype

Needs = tuple[bool, bool, bool]  # whether gradients of hidden, weight and bias are asked for


@dataclass(frozen=True)
class LossProblem:
    """hidden [T, H], weight [V, H], bias [V] or None; targets [T] count from this part's first word, and what lies
    outside of [0, V) is another part's. counted [T]: which tokens take part; None: all.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    counted: Tensor | None
    softcap: float
    backend: LossBackend
    chunk_rows: int
    needs_sum: bool = False

    @property
    def kept(self) -> Tensor | None:
        """The numbers of the tokens that take part, where the CPU can tell; None: all are computed."""
        on_cpu = self.hidden.device.type == "cpu"
        return self.counted.nonzero().squeeze(-1) if on_cpu and self.counted is not None else None


def rows_of_a_chunk(num_tokens: int, width: int, vocabulary_size: int, bounds: tuple[int, int]) -> int:
    """So many that the logits of a chunk have about as many numbers as hidden; a power of two (Liger's rule).

    bounds: the least and the most.
    """
    least, most = bounds
    wanted = -(-num_tokens // -(-vocabulary_size // max(1, width))) if vocabulary_size else 1
    return min(max(1 << max(0, wanted - 1).bit_length(), least), most)


@dataclass
class Chunk:
    """Some tokens, and what has been found of them."""

    rows: Tensor | slice  # which of the tokens
    hidden: Tensor  # [n, H], in the dtype of operands
    targets: Tensor
    state: Tensor  # [4, n]
    logits: Tensor | None = None  # the memory where those of each block [n, Vb] stand, one after the other


@dataclass
class Gradients:
    """hidden's and weight's in their own dtypes, bias's; empty where not asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


@dataclass
class Sums:
    """Gradients while chunks are added: hidden's of the tokens that take part, weight's and bias's of each block."""

    hidden: Tensor | None = None
    weight: list[Tensor] = field(default_factory=list)
    bias: list[Tensor] = field(default_factory=list)
    whole_weight: Tensor | None = None  # of which those of the blocks are parts, where no dtype changes


class ChunkedLoss:
    def __init__(self, problem: LossProblem) -> None:
        self.problem, self.kept = problem, problem.kept
        hidden, weight = problem.hidden, problem.weight
        self.dtype, self.operand_dtype = accumulate_dtype(hidden), problem.backend.operand_dtype(hidden)
        if problem.counted is not None and self.kept is None:  # what they hold, NaN even, must not be seen
            hidden = hidden.masked_fill(~problem.counted.unsqueeze(-1), 0)
        self.hidden = hidden
        self.num_tokens = hidden.shape[0] if self.kept is None else self.kept.shape[0]
        vocabulary_size, row_bytes = weight.shape[0], max(1, weight.shape[1]) * self.dtype.itemsize
        limit = problem.backend.block_bytes
        num_blocks = 1 if limit is None else max(1, -(-vocabulary_size * row_bytes // limit))
        self.blocks = weight.tensor_split(num_blocks)
        self.biases = (
            [None] * num_blocks
            if problem.bias is None
            else [part.to(self.dtype).contiguous() for part in problem.bias.tensor_split(num_blocks)]
        )
        self.starts = [0]
        for block in self.blocks:
            self.starts.append(self.starts[-1] + block.shape[0])
        self._wide_weight: Tensor | None = None
        self._free: list[Tensor] = []

    def chunks(self) -> Iterator[Chunk]:
        for begin in range(0, self.num_tokens, self.problem.chunk_rows):
            rows: slice | Tensor = slice(begin, min(begin + self.problem.chunk_rows, self.num_tokens))
            if self.kept is not None:
                rows = self.kept[rows]
            hidden = self.hidden[rows].to(self.operand_dtype)
            state = hidden.new_zeros(4, hidden.shape[0], dtype=self.dtype)
            yield Chunk(rows, hidden, self.problem.targets[rows], state)

    def measure(self, chunk: Chunk, *, keep_logits: bool) -> None:
        """Products with all words, and their statistics."""
        problem, memory = self.problem, self._memory(chunk, whole=keep_logits)
        for number, block in enumerate(self.blocks):
            logits = self._logits_of(chunk, number, memory, whole=keep_logits)
            problem.backend.multiply_into(logits, chunk.hidden, self._operand(block))
            problem.backend.statistics(self._block(chunk, number, logits), chunk.state, problem.needs_sum)
        if keep_logits:
            chunk.logits = memory
        else:
            self._free.append(memory)

    def differentiate(
        self, chunk: Chunk, of: Coefficients, sums: Sums, needs: Needs, dhidden: Tensor | None
    ) -> None:
        """Adds the chunk's part to the gradients of weight and bias; writes hidden's [n, H]."""
        problem, is_raw = self.problem, chunk.logits is None
        multiply_into = problem.backend.multiply_into
        is_first = not (sums.weight or sums.bias)
        memory = self._memory(chunk, whole=False) if chunk.logits is None else chunk.logits
        for number, block in enumerate(self.blocks):
            operand = self._operand(block) if is_raw or dhidden is not None else block
            logits = self._logits_of(chunk, number, memory, whole=not is_raw)
            if is_raw:
                multiply_into(logits, chunk.hidden, operand)
            dlogits = problem.backend.gradient(
                self._block(chunk, number, logits), of, is_raw, self.operand_dtype
            )
            if dhidden is not None:
                multiply_into(dhidden, dlogits, operand.t(), add=number > 0)
            if needs[1]:
                if is_first:
                    sums.weight.append(self._new_sum(sums, number))
                multiply_into(sums.weight[number], dlogits.t(), chunk.hidden.t(), add=not is_first)
            if needs[2]:
                dbias = dlogits.sum(0, dtype=self.dtype)
                if is_first:
                    sums.bias.append(dbias)
                else:
                    sums.bias[number] += dbias
        self._free.append(memory)

    def gradients(self, sums: Sums, needs: Needs) -> Gradients:
        """The sums of all chunks in the dtypes of what they are gradients of; frees the sums."""
        hidden, bias = self.problem.hidden, self.problem.bias
        dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
        if sums.hidden is not None:
            dhidden = sums.hidden
            if self.kept is not None:
                dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, self.kept, dhidden)
        if needs[1]:
            dweight = self._weight_gradient(sums)
        if needs[2]:
            assert bias is not None
            dbias = torch.cat(sums.bias).to(bias.dtype) if sums.bias else torch.zeros_like(bias)
        return Gradients(dhidden, dweight, dbias)

    def _weight_gradient(self, sums: Sums) -> Tensor:
        if sums.whole_weight is not None:
            return sums.whole_weight
        dweight = self.problem.weight.new_empty(self.problem.weight.shape)
        if not sums.weight:
            return dweight.zero_()
        while sums.weight:  # freed one by one
            number = len(sums.weight) - 1
            dweight[self.starts[number] : self.starts[number + 1]] = sums.weight.pop()
        return dweight

    def _new_sum(self, sums: Sums, number: int) -> Tensor:
        weight, begin, end = self.problem.weight, self.starts[number], self.starts[number + 1]
        if weight.dtype != self.dtype:
            return weight.new_empty(end - begin, weight.shape[1], dtype=self.dtype)
        if sums.whole_weight is None:
            sums.whole_weight = weight.new_empty(weight.shape)
        return sums.whole_weight[begin:end]

    def _operand(self, block: Tensor) -> Tensor:
        """A block of the weight in the dtype of operands, until the next is asked for."""
        if block.dtype == self.operand_dtype:
            return block
        if self._wide_weight is None:
            self._wide_weight = block.new_empty(self.blocks[0].shape, dtype=self.operand_dtype)
        return self._wide_weight[: block.shape[0]].copy_(block)

    def _memory(self, chunk: Chunk, *, whole: bool) -> Tensor:
        """Memory for the logits of a chunk, of all words or of one block at a time."""
        size = chunk.hidden.shape[0] * (self.starts[-1] if whole else self.blocks[0].shape[0])
        if self._free:
            return self._free.pop()  # that of the first chunk, which no other exceeds
        return chunk.hidden.new_empty(size, dtype=self.dtype)

    def _logits_of(self, chunk: Chunk, number: int, memory: Tensor, *, whole: bool) -> Tensor:
        rows, size = chunk.hidden.shape[0], self.blocks[number].shape[0]
        begin = rows * self.starts[number] if whole else 0
        return memory[begin : begin + rows * size].view(rows, size)

    def _block(self, chunk: Chunk, number: int, logits: Tensor) -> Block:
        targets = chunk.targets - self.starts[number]
        return Block(logits, self.biases[number], targets, self.problem.softcap)
