"""AdamW whose states lie on a disk between updates: python on_disk.py"""

import functools

import torch

import pypar

model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
make = functools.partial(torch.optim.AdamW, lr=1e-3)
optimizer = pypar.OnDisk(make, model.parameters(), ".", part_bytes=4 << 20)  # a folder of a local disk
x = torch.randn(64, 512)
for _ in range(3):
    torch.nn.functional.mse_loss(model(x), x).backward()
    optimizer.step()
    optimizer.zero_grad()
print(optimizer.way)
