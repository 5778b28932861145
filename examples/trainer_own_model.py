"""pypar's training loop around a model of one's own: torchrun --nproc-per-node 2 trainer_own_model.py"""

import torch
import torch.distributed as dist
from torch import nn

from pypar.train import RunConfig, Trainer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(64), nn.GRU(64, 64, batch_first=True)
        self.widen, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        x = x + self.mix(self.norm(x))[0]
        return x + self.narrow(nn.functional.gelu(self.widen(x)))


torch.manual_seed(0)  # every rank makes the same model
model = nn.Sequential(nn.Embedding(256, 64), Block(), Block(), nn.Linear(64, 256))  # token ids to logits
config = RunConfig.from_dict(
    {"name": "gru", "mesh": "tp=2", "train": {"steps": 8, "sequence_length": 64, "evaluate_every": 4}}
)
trainer = Trainer(config, model=model, plan={"*.widen": "column", "*.narrow": "row"})
trainer.fit()  # steps, evaluations, checkpoints and metrics as configured; or trainer.train_step(), one by one
print(f"validation loss {trainer.evaluate():.3f} after {trainer.step} steps")
dist.destroy_process_group()
