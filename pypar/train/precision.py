"""The dtypes that weights and activations may have; master weights and gradients are fp32."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALED = ("fp16",)  # of a range so small that the loss is multiplied by `pypar.optimizers.loss_scale`
