"""SafetensorsWriter and SafetensorsReader under torch.distributed.checkpoint alone, and the files that they share."""

import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from pypar.files.tensors import DTYPES, Entry, open_tensors, read_slice, write
from pypar.train.checkpoint.index import Box, IndexedTensor, check_index, read_index
from pypar.train.checkpoint.storage import SafetensorsReader, SafetensorsWriter

DTYPES_OF_TORCH = [getattr(torch, name) for name, _ in DTYPES.values()]


def _save(state: dict, folder: Path) -> None:
    dcp.save(state, storage_writer=SafetensorsWriter(folder))


def _load(state: dict, folder: Path) -> None:
    dcp.load(state, storage_reader=SafetensorsReader(folder))


def _samples() -> dict:
    """Every dtype, a scalar, no elements, views with gaps, and a nested dict as optimizers have."""
    bits = torch.arange(24, dtype=torch.uint8)
    state: dict = {
        str(dtype): bits.view(torch.bool if dtype == torch.bool else dtype) for dtype in DTYPES_OF_TORCH
    }
    state[str(torch.bool)] = torch.tensor([True, False, True])
    state |= {"scalar": torch.tensor(2.5), "count": torch.tensor(7), "none": torch.empty(3, 0)}
    state |= {"transposed": torch.arange(12.0).view(3, 4).t(), "gaps": torch.arange(10)[::3]}
    return {"optimizer": {"state": state, "w/../odd name\n": torch.ones(2)}}


def _tensors(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for name, value in state.items():
        inner = _tensors(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        found |= inner
    return found


def _zeros(state: dict) -> dict:
    return {n: _zeros(v) if isinstance(v, dict) else torch.zeros_like(v) for n, v in state.items()}


def _bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_dtype_and_shape_comes_back_bitwise_and_other_tools_read_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = _samples()
    _save(state, tmp_path / "a")
    loaded = _zeros(state)
    _load(loaded, tmp_path / "a")
    expected = _tensors(state)
    for name, tensor in _tensors(loaded).items():
        assert tensor.dtype == expected[name].dtype and _bits(tensor) == _bits(expected[name]), name
    theirs = safetensors.load_file(tmp_path / "a" / "rank_00000.safetensors")
    assert set(theirs) == {name for name, tensor in expected.items() if tensor.numel()}
    for name, tensor in theirs.items():
        assert tensor.shape == expected[name].shape and _bits(tensor) == _bits(expected[name]), name
    file, entries = open_tensors(tmp_path / "a" / "rank_00000.safetensors")
    file.close()
    assert all(entry.position % DTYPES[entry.dtype][1] == 0 for entry in entries.values())


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int16), "s": torch.tensor(1.5)}
    safetensors.save_file(tensors, tmp_path / "x", {"format": "pt", "note": "theirs"})
    file, entries = open_tensors(tmp_path / "x")
    with file:
        for name, tensor in tensors.items():
            out = np.zeros(tensor.shape, {2: np.int16, 4: np.int32}[tensor.itemsize])
            read_slice(file, entries[name], (0,) * tensor.dim(), tuple(tensor.shape), out)
            assert out.tobytes() == tensor.numpy().tobytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_another_dtype_is_converted_as_dcp_does(tmp_path: Path) -> None:
    _save({"w": torch.tensor([1.0, 1 / 3])}, tmp_path)
    loaded = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    _load(loaded, tmp_path)
    assert loaded["w"].equal(torch.tensor([1.0, 1 / 3]).bfloat16())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"w": torch.ones(1), "step": 5}, "step is not a tensor, and a checkpoint holds tensors only"),
        (
            {"w": torch.ones(1, dtype=torch.complex64)},
            "w is of torch.complex64, which safetensors does not hold",
        ),
        ({"__metadata__": torch.ones(1)}, "cannot be named '__metadata__'"),
        ({"w": torch.ones((1,) * 30)}, "corners, more than"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, state: dict, sentence: str) -> None:
    with pytest.raises(CheckpointException) as refused:
        _save(state, tmp_path)
    (error, _) = refused.value.failures[0]
    assert isinstance(error, ValueError) and sentence in str(error)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_whole_checkpoint_is_not_written_over_and_half_of_one_is(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "rank_00000.safetensors").symlink_to("elsewhere")  # would be written through
    _save({"w": torch.ones(2)}, tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "kept"
    with pytest.raises(CheckpointException, match="already holds a checkpoint"):
        _save({"w": torch.zeros(2)}, tmp_path)
    loaded = {"w": torch.zeros(2)}
    _load(loaded, tmp_path)
    assert loaded["w"].equal(torch.ones(2))


def _placed(whole: torch.Tensor, placements: list) -> DTensor:
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2, torch.distributed.get_world_size() // 2))
    return distribute_tensor(whole, mesh, placements)


WHOLE = {"w": torch.arange(35.0).view(7, 5), "v": torch.arange(3), "s": torch.tensor(4.0)}


def save_sharded(folder: str, cuts: list) -> None:
    """Uneven parts (7 over 4), ranks with none (3 over 4), and a scalar that all ranks hold."""
    state = {
        name: _placed(whole, cuts if whole.dim() else [Replicate()] * 2) for name, whole in WHOLE.items()
    }
    dcp.save(state, storage_writer=SafetensorsWriter(folder))


def load_sharded(folder: str, cuts: list) -> list[str]:
    state = {
        name: _placed(torch.zeros_like(whole), cuts if whole.dim() else [Replicate()] * 2)
        for name, whole in WHOLE.items()
    }
    dcp.load(state, storage_reader=SafetensorsReader(folder))
    return [name for name, tensor in state.items() if not tensor.full_tensor().equal(WHOLE[name])]


def test_uneven_parts_of_dtensors(ranks, tmp_path: Path) -> None:
    ways = {
        2: [[Shard(0), Replicate()], [Replicate(), Shard(0)]],
        4: [[Shard(0), Shard(0)], [Replicate(), Shard(0)]],
    }
    for world, several in ways.items():
        for i, cuts in enumerate(several):
            folder = tmp_path / f"{world}-{i}"
            ranks(world, save_sharded, str(folder), cuts)
            index = read_index(folder)
            stored = sum(math.prod(box.lengths) for box in index["w"].boxes)
            assert stored == 35 and len(index["s"].boxes) == 1
            for other, cuts_there in ways.items():
                assert set(map(tuple, ranks(other, load_sharded, str(folder), cuts_there[1 - i]))) == {()}


@given(st.data())
def test_slices_are_as_numpy_takes_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    lengths = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    whole = np.random.default_rng(0).integers(0, 1 << 30, shape, np.int32)
    path = tmp_path_factory.mktemp("slices") / "x"
    lead = np.arange(data.draw(st.integers(0, 9)), dtype=np.uint8)  # so that positions are odd as well
    entries = {"lead": Entry("U8", lead.shape), "w": Entry("I32", shape)}
    write(path, entries, [lead, whole.reshape(-1).view(np.uint8)])
    file, found = open_tensors(path)
    with file:
        out = np.zeros((*lengths, 2), np.int32)[..., data.draw(st.integers(0, 1))]  # with gaps
        for target in (out, np.zeros(lengths, np.int32)):
            read_slice(file, found["w"], offsets, lengths, target)
            assert (
                target == whole[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
            ).all()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A slice of a file of 512 GB, which is all hole but for a few bytes."""
    rows, columns = 1 << 19, 1 << 18
    size = 4 * rows * columns
    header = '{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}' % (rows, columns, size)  # noqa: UP031
    with (tmp_path / "x").open("wb") as sparse:
        sparse.write(len(header).to_bytes(8, "little") + header.encode())
        try:
            sparse.truncate(8 + len(header) + size)
        except OSError as error:
            pytest.skip(f"this file system has no files of 512 GB: {error}")
        sparse.seek(8 + len(header) + 4 * (400_000 * columns + 77))
        sparse.write(np.array([5, 6, 7], np.int32).tobytes())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    file, entries = open_tensors(tmp_path / "x")
    with file:
        row = np.zeros((1, columns), np.int32)
        read_slice(file, entries["w"], (400_000, 0), (1, columns), row)
        corner = np.zeros((200, 3), np.int32)
        read_slice(file, entries["w"], (399_900, 77), (200, 3), corner)
    assert row[0, 76:81].tolist() == [0, 5, 6, 7, 0]
    assert corner[100].tolist() == [5, 6, 7] and corner.sum() == 18
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


@given(st.data())
def test_boxes_cover_a_tensor_once_or_are_refused(data: st.DataObject) -> None:
    """Boxes that cut a tensor again and again cover it; with one of them moved, grown or left out they do not."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        (offsets, lengths) = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, lengths[dim]))  # 0 and all: an empty box
        for start, length in ((0, cut), (cut, lengths[dim] - cut)):
            part = [list(offsets), list(lengths)]
            part[0][dim], part[1][dim] = offsets[dim] + start, length
            boxes.append((tuple(part[0]), tuple(part[1])))
    count = np.zeros(shape, int)
    if data.draw(st.booleans()):
        i = data.draw(st.integers(0, len(boxes) - 1))
        changed = tuple(data.draw(st.integers(0, n)) for n in shape)
        boxes[i] = (
            changed,
            tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, changed, strict=True)),
        )
    for offsets, lengths in boxes:
        count[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))] += 1
    stored = tuple(Box(o, n, "rank_00000.safetensors", str(i)) for i, (o, n) in enumerate(boxes))
    index = {"w": IndexedTensor("F32", shape, stored)}
    if (count == 1).all():
        check_index(index)
    else:
        with pytest.raises(ValueError, match="overlap|leave gaps"):
            check_index(index)


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from pypar.layout import Layout
from pypar.mesh import Mesh
from pypar.train import checkpoint

state, mesh = {"w": (torch.ones(300_000), Layout((300_000,)))}, Mesh()
checkpoint.save(Path(sys.argv[1]), 1, state, mesh, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    checkpoint.save(Path(sys.argv[1]), 2, state, mesh, {})
except RuntimeError as error:
    print(error)
"""


def test_a_disk_that_is_full_is_named_with_the_rank(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert said.returncode == 0, said.stderr
    assert (
        "step_00000002 cannot be written: rank 0: OSError: " in said.stdout and said.stdout.count("\n") == 1
    )
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "step_00000002.partial"}
    assert os.listdir(tmp_path / "step_00000002.partial") == ["rank_00000.safetensors.partial"]
