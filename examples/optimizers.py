"""A model in bf16 with masters in fp32 and moments in 8 bits; Muon updates its matrices: python optimizers.py"""

import torch

import pypar

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)).bfloat16()
matrices = [model[0].weight]
others = [p for p in model.parameters() if p is not matrices[0]]
optimizers = [
    pypar.Muon(matrices, lr=0.02),
    pypar.AdamW(others, lr=1e-2, master_weights=True, moments=torch.uint8),
]
x = torch.randn(256, 64).bfloat16()
target = x[:, :8].float().sin()
losses = []
for step in range(30):
    loss = (model(x).float() - target).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
print(f"{losses[0]:.3f} to {losses[-1]:.3f}")
assert losses[-1] < 0.5 * losses[0]
