"""The dtypes that weights and activations may have; master weights and gradients are fp32."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
