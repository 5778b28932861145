"""What the styles of a plan that Hugging Face transformers ships with a model mean in pypar's roles."""

from __future__ import annotations

from torch import nn

from pypar.role import WHOLE

STYLES = {
    "colwise": "column",
    "colwise_rep": "column_gather",
    "colwise_gather_output": "column_gather",
    "rowwise": "row",
    "rowwise_rep": "row_split",
    "rowwise_split_input": "row_split",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "per_head",
    "mla_kv_a_proj": "latent_kv",
    # What stays whole on every rank is right as it is.
    "replicate": WHOLE,
    "replicated": WHOLE,
    "embedding_colwise": WHOLE,
    "sequence_parallel": WHOLE,
    # Experts and the layers around them in versions before 5, each set of which ends in a sum of its own.
    **dict.fromkeys(("local", "local_colwise", "local_rowwise", "local_packed_rowwise", "gather"), WHOLE),
    # The parameters of this module have entries of their own.
    "local_params": WHOLE,
}
# Styles of a block of experts, for which pypar has no cut: the experts and all inside them stay whole.
EXPERTS = ("moe_tp_experts", "moe_identity_expert", "grouped_gemm", "packed_colwise", "packed_rowwise")


def role_of_style(style: str, module: nn.Module | None = None) -> str:
    """The role that a style of `STYLES` gives to a module, or to a bare parameter (None)."""
    role = STYLES[style]
    is_by_rows = role in ("row", "row_split")
    return "vocab" if is_by_rows and isinstance(module, nn.Embedding) else role  # as older versions call it
