"""A model of which no rank ever holds the whole: torchrun --nproc-per-node 2 meta_device.py"""

import torch
import torch.distributed as dist

import pypar.comm
from pypar.models import Decoder, DecoderConfig
from pypar.parallel import ParallelPlan, materialize

dist.init_process_group("pypar")
mesh = pypar.Mesh(tp=2)
config = DecoderConfig(
    vocab_size=512, num_layers=2, d_model=256, num_heads=8, num_kv_heads=4, head_size=32, d_ff=704
)
with torch.device("meta"):
    model = Decoder(config, seed=None)
pypar.parallelize(model, mesh, ParallelPlan(sequence_parallel=True))  # the decoder knows its roles
materialize(model, model.initial_weight(seed=0))  # or a function that reads a tensor by its name from files
held = sum(p.local().numel() if hasattr(p, "local") else p.numel() for p in model.parameters())
print(f"{held:,} of {sum(p.numel() for p in model.parameters()):,} parameters are on this rank")
dist.destroy_process_group()
