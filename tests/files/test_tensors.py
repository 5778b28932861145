"""Files in the format safetensors that are written tensor by tensor. Reading them: test_storage.py."""

import torch

from pypar.files.tensors import Entry, TensorFile, dtype_name


def test_a_safetensors_file_in_any_order(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "a": torch.randn(3, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "half": torch.randn(7).bfloat16(),
        "strided": torch.randn(4, 6).t(),
        "bool": torch.tensor([True, False]),
    }
    entries = {
        name: Entry(dtype_name(x.dtype), tuple(x.shape))
        for name, x in sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    }
    file = TensorFile(tmp_path / "x.safetensors", entries)
    for name in reversed(tensors):
        assert not (tmp_path / "x.safetensors").exists()
        file.write(name, tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    file.finish()
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
