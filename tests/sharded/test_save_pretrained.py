"""save_pretrained of transformers models that are cut: whole files, which from_pretrained reads."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pypar
from pypar.mesh import Mesh
from tests.sharded.cases import full

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(tied=False, seed=0, dtype=torch.float32):
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def run_save(folder, tied, dtype, options):
    import transformers

    whole = llama(tied, dtype=dtype)
    cut = pypar.parallelize(llama(tied, dtype=dtype), Mesh(tp=dist.get_world_size()))
    cut.save_pretrained(folder, **options)
    again, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    ours, theirs = again.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs) and again.dtype == dtype
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    if tied:
        assert again.lm_head.weight is again.model.embed_tokens.weight
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_from_pretrained_gives_the_model(ranks, tmp_path, tied, dtype):
    import transformers

    for files in ranks(2, run_save, str(tmp_path / "cut"), tied, dtype, {}):
        assert files == ["config.json", "generation_config.json", "model.safetensors"]
    llama(tied, dtype=dtype).save_pretrained(tmp_path / "whole")
    configurations = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("cut", "whole")]
    assert configurations[0] == configurations[1]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut").num_parameters()


def test_files_of_a_size_and_their_index(ranks, tmp_path):
    """They replace what an earlier save left, whatever its number of files."""
    folder = tmp_path / "model"
    for options, num_files in (
        ({}, 1),
        ({"max_shard_size": "20KB"}, 4),
        ({"max_shard_size": 8000}, 11),
        ({}, 1),
    ):
        for files in ranks(2, run_save, str(folder), False, torch.float32, options):
            weights = [name for name in files if name.endswith(".safetensors")]
            assert len(weights) >= num_files and not [name for name in files if "partial" in name]
            assert ("model.safetensors.index.json" in files) == (num_files > 1)
            assert (num_files == 1) == (weights == ["model.safetensors"])
    variant = {"max_shard_size": "20KB", "variant": "x"}
    llama().save_pretrained(tmp_path / "whole", **variant)
    ranks(2, run_variant, str(tmp_path / "variant"), variant)
    assert sorted(os.listdir(tmp_path / "variant")) == sorted(os.listdir(tmp_path / "whole"))
    for name in (name for name in os.listdir(tmp_path / "whole") if "index" in name):
        ours, theirs = (json.loads((tmp_path / kind / name).read_text()) for kind in ("variant", "whole"))
        assert ours == theirs


def run_variant(folder, options):
    pypar.parallelize(llama(), Mesh(tp=2)).save_pretrained(folder, **options)


def run_data_parallel(folder):
    cut = pypar.parallelize(llama(), Mesh(dp=2, tp=2))
    cut.model.save_pretrained(f"{folder}/base")  # a model within the model
    cut.save_pretrained(folder)
    return sorted(os.listdir(folder))


def test_other_data_ranks_write_nothing(ranks, tmp_path):
    import transformers

    for files in ranks(4, run_data_parallel, str(tmp_path)):
        assert files == ["base", "config.json", "generation_config.json", "model.safetensors"]
    base, whole = transformers.LlamaModel.from_pretrained(tmp_path / "base"), llama()
    for (name, ours), theirs in zip(
        base.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def run_after_training(folder):
    """As people do it: train, keep a state_dict, load a whole file's weights into the model that is cut."""
    import transformers

    cut = pypar.parallelize(llama(), Mesh(tp=2))
    optimizer = torch.optim.AdamW(cut.parameters(), lr=0.01)
    ids = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(1))
    cut(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(cut.parameters(), 1.0)
    optimizer.step()
    cut.save_pretrained(folder, state_dict=cut.state_dict())
    again = transformers.LlamaForCausalLM.from_pretrained(folder)
    for name, value in cut.state_dict().items():
        assert torch.equal(full(value), again.state_dict()[name]), name
    torch.testing.assert_close(cut(input_ids=ids).logits, again(input_ids=ids).logits)
    other = pypar.parallelize(llama(seed=3), Mesh(tp=2))
    other.load_state_dict(again.state_dict())
    torch.testing.assert_close(other(input_ids=ids).logits, again(input_ids=ids).logits)
    with pytest.raises(ValueError, match=r"resize the model before pypar.parallelize"):
        cut.resize_token_embeddings(66)


def test_after_training_and_back(ranks, tmp_path):
    ranks(2, run_after_training, str(tmp_path))


def run_alone(folder):
    cut = pypar.parallelize(llama(), Mesh(tp=2))
    cut.save_pretrained.wait_s = 0.5
    message, seconds = None, time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as caught:
            cut.save_pretrained(folder)
        message = str(caught.value)
    seconds = time.monotonic() - seconds
    dist.barrier()
    cut.save_pretrained.wait_s = 60.0
    cut.save_pretrained(folder)
    return message, seconds, len(os.listdir(folder))


def test_one_rank_alone_is_told_so(ranks, tmp_path):
    (message, seconds, num_files), (_, _, _) = ranks(2, run_alone, str(tmp_path))
    assert (
        "was called on this rank, but ranks [1] did not call it within 0.5 s; call it on every rank"
        in message
    )
    assert seconds < 5 and num_files == 3


def run_failing(folder):
    Path(folder).parent.mkdir(exist_ok=True)
    Path(folder).write_text("a file where the folder should be")
    cut = pypar.parallelize(llama(), Mesh(tp=2))
    with pytest.raises((RuntimeError, OSError)) as caught:
        cut.save_pretrained(folder)
    with pytest.raises(ValueError, match="has no push_to_hub"):
        cut.save_pretrained(folder, push_to_hub=True)
    return str(caught.value)


def test_a_failure_to_write_reaches_all_ranks(ranks, tmp_path):
    first, second = ranks(2, run_failing, str(tmp_path / "file"))
    assert "File exists" in first and "failed on rank 0, which writes" in second


def run_converted(folder):
    """Experts are stored one by one and computed as one tensor: transformers converts what was gathered."""
    import transformers

    def make():
        torch.manual_seed(0)
        sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, pad_token_id=0))

    plan = {
        "*.q_proj": "column",
        "*.k_proj": "column",
        "*.v_proj": "column",
        "*.o_proj": "row",
        "lm_head": "column_gather",
    }
    cut = pypar.parallelize(make(), Mesh(tp=2), plan)
    cut.save_pretrained(folder)
    dist.barrier()
    again = transformers.MixtralForCausalLM.from_pretrained(folder)
    for name, value in make().state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_models_that_are_stored_in_another_form(ranks, tmp_path):
    ranks(2, run_converted, str(tmp_path))
