"""What holds of rms_norm and layer_norm alike, as operators of torch."""

import torch


def opcheck_norm(op, inputs, name):
    """Forward and backward of pypar::<op>, on inputs [R, D] of its case, by the backend of this name."""
    vectors = [inputs.get(key) for key in ("weight", "bias")]
    arguments = (inputs["x"], inputs.get("residual"), *vectors, 1e-5, 0.0, name)
    torch.library.opcheck(getattr(torch.ops.pypar, f"{op}_forward"), arguments)
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    rows = x.shape[0]
    mean = torch.rand(rows) if op == "layer_norm" else torch.empty(0)
    arguments = (x, x if "residual" in inputs else None, x, weight, "bias" in inputs, mean, torch.rand(rows))
    torch.library.opcheck(getattr(torch.ops.pypar, f"{op}_backward"), (*arguments, 0.0, name))


def assert_compiles_as_one_graph(norm, inputs):
    """Compiled it gives the same bits, and differentiates."""
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    outs = compiled(**inputs)
    torch.testing.assert_close(outs, norm(**inputs), rtol=0, atol=0)
    (outs[0] if "residual" in inputs else outs).sum().backward()


def assert_same_in_parts(norm, inputs):
    """Rows of 16 MiB, which native kernels store past the caches, are those of two halves, which they do not."""
    inputs = {key: x.detach() for key, x in inputs.items()}
    whole = norm(**inputs, backend="native")
    halves = zip(*(inputs[key].chunk(2) for key in inputs if inputs[key].dim() > 1), strict=True)
    names = [key for key in inputs if inputs[key].dim() > 1]
    vectors = {key: x for key, x in inputs.items() if x.dim() == 1}
    parts = [norm(**dict(zip(names, half, strict=True)), **vectors, backend="native") for half in halves]
    if "residual" in inputs:
        parts = [torch.cat(each) for each in zip(*parts, strict=True)]
        assert all(map(torch.equal, whole, parts))
    else:
        assert torch.equal(whole, torch.cat(parts))
