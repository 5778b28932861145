"""ZeRO: optimizer states, gradients and parameters cut over the data ranks, each stage one more of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pypar.blocks import Block
from pypar.data_parallel.zero.store import Zero
from pypar.mesh import Mesh
from pypar.ops.uncompiled import uncompiled

__all__ = ["Zero", "zero"]


@uncompiled("it replaces the memory of parameters")
def zero(  # noqa: PLR0913 - one argument an option
    model: nn.Module,
    mesh: Mesh,
    stage: int = 3,
    *,
    shard_size: int = 0,
    reshard: bool | int = True,
    dtype: torch.dtype | None = None,
    average: bool = True,
    accumulate: str = "local",
    blocks: Sequence[Block | str] | None = None,
    bucket_bytes: int = 25 << 20,
    offload: str = "none",
    device_bytes: int | None = None,
) -> Zero:
    """Train a model whose states are cut over the data ranks of a mesh (arXiv 1910.02054).

        store = pypar.zero(model, mesh, stage=3)
        optimizer = torch.optim.AdamW(store.parameters(), lr)   # any elementwise optimizer, on this rank's rows
        for batch in batches:
            store.zero_grad()
            with store.accumulate():
                for microbatch in batch[:-1]:
                    loss(model(microbatch)).backward()
            loss(model(batch[-1])).backward()                   # gradients are final when it returns
            store.clip_grad_norm(1.0)
            optimizer.step()
            store.publish()

    Every rank of the mesh calls it with a model of the same values, and then runs the same forwards and backwards. The
    model may have been spread by `pypar.parallelize` before. Parameters are cut along dim 0 as torch.tensor_split cuts.
    Over the backend "pypar" parameters, moments and losses are the same bits for every stage.

    stage         0: all whole; 1: masters and optimizer states are cut; 2: gradients too, a block's whole gradients are
                  there until they are reduced; 3: parameters too, which are whole only while their block computes
    shard_size    ranks of dp over which is cut, a divisor of dp; 0: all of them
    reshard       at stage 3: True frees a block after its forward, False keeps it until its backward is over, n keeps
                  it cut over n ranks in between
    dtype         what the model computes in; floating-point inputs are converted. None: the parameters' own dtypes
    average       gradients are the mean over the data ranks, otherwise their sum
    accumulate    "local": microbatches' gradients are added up whole and reduced once; "reduce": each microbatch is
                  reduced into this rank's rows (stages 2 and 3), with less memory and another order of sums
    blocks        what is gathered at once: names of modules or `pypar.blocks.Block`s. None: the model's own blocks(),
                  else the members of its outermost ModuleLists of two or more modules of one class. All else is the
                  root, which is whole from its forward to the end of its backward; so is what several blocks share
    bucket_bytes  of parameters that travel at once, about
    offload       "chunks": rows of parameters, gradients and what an optimizer keeps lie in chunks of up to
                  bucket_bytes that move between the device and the host; they are updated where they lie.
                  `Zero.holds_states_of` lets optimizer states take part. At stages below 3 whole parameters stay on the
                  device; at all stages whole gradients are there until they are reduced
    device_bytes  with it: the most that the store takes of the device, where OverBudgetError says what did not fit

    ValueError, before anything is changed, for options that do not fit and for ranks whose models differ.
    """
    if isinstance(model, nn.Module) and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "there is no parameter that requires a gradient; pass a model that is trained, or train without a store"
        )
    return Zero(
        [model],
        mesh,
        stage=stage,
        shard_size=shard_size,
        reshard=reshard,
        dtype=dtype,
        average=average,
        accumulate=accumulate,
        blocks=blocks,
        bucket_bytes=bucket_bytes,
        offload=offload,
        device_bytes=device_bytes,
    )
