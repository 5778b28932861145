"""1D tensor parallelism: linear layers, embedding and loss cut over tp.

torch.compile ends a graph before each of these layers and begins another behind it; with fullgraph=True torch's error
names the layer. On an axis of one rank they are plain operators, and graphs stay whole.

Names are loaded when they are first used: a configuration is checked without torch.

Sources: Megatron-LM (arXiv 1909.08053); sequence parallelism (arXiv 2205.05198).
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.tensor_parallel.column import ColumnParallelLinear, column_parallel
    from pypar.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from pypar.tensor_parallel.embedding import VocabParallelEmbedding
    from pypar.tensor_parallel.head import VocabParallelHead
    from pypar.tensor_parallel.roles import USUAL_PLAN
    from pypar.tensor_parallel.row import RowParallelLinear, row_parallel

__all__ = [
    "USUAL_PLAN",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "column_parallel",
    "row_parallel",
    "vocab_parallel_cross_entropy",
]

__getattr__ = loader(
    __name__,
    {
        "USUAL_PLAN": "pypar.tensor_parallel.roles",
        "ColumnParallelLinear": "pypar.tensor_parallel.column",
        "RowParallelLinear": "pypar.tensor_parallel.row",
        "VocabParallelEmbedding": "pypar.tensor_parallel.embedding",
        "VocabParallelHead": "pypar.tensor_parallel.head",
        "column_parallel": "pypar.tensor_parallel.column",
        "row_parallel": "pypar.tensor_parallel.row",
        "vocab_parallel_cross_entropy": "pypar.tensor_parallel.cross_entropy",
    },
    __all__,
)
