"""What a script may do with a model and its store: storage that is freed, several backwards, evaluation, norms."""

import pytest
import torch
from torch import nn

from tests.data_parallel.zero.programs import Block
from tests.data_parallel.zero.script import STAGES, assert_same, bytes_of, loss_of, make, update, whole_state
from tests.data_parallel.zero.trees import WIDTH, batch


def run_freed(reshard):
    model, store, optimizer, rank = make(reshard=reshard)
    views, sizes = {}, []

    def look(module, *_):
        """Which blocks are whole while one computes."""
        views.setdefault(module, [p.data.view(-1) for p in module.parameters()])
        sizes.append([bytes_of(layer.parameters()) for layer in model.layers])

    for layer in model.layers:
        layer.second.register_forward_hook(look)
    seen = []
    for step in range(2):
        loss = loss_of(model, rank, step)
        seen.append([bytes_of(layer.parameters()) for layer in model.layers])
        loss.backward()
        seen.append([bytes_of(model.parameters()), *(bytes_of(made) for made in views.values())])
        update(store, optimizer)
        seen.append([bytes_of(model.parameters()), *(bytes_of(made) for made in views.values())])
    return sizes, seen


def test_blocks_are_freed_after_their_forward(ranks):
    whole = sum(p.nbytes for p in Block().parameters())
    for sizes, seen in ranks(2, run_freed, True):
        for index, held in enumerate(sizes):
            computing = index % 3
            assert held[computing] == whole
            assert all(held[other] == 0 for other in range(computing))  # the one after it may be on its way
        assert all(not any(held) for held in seen), seen


def test_blocks_that_are_kept_are_freed_after_their_backward(ranks):
    whole = sum(p.nbytes for p in Block().parameters())
    for _, seen in ranks(2, run_freed, False):
        assert seen[0] == seen[3] == [whole] * 3
        assert not any(any(held) for held in (seen[1], seen[2], seen[4], seen[5])), seen


def run_identity(stage):
    model, store, optimizer, rank = make(stage)
    before = [(name, id(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    shares = [(id(p), p.data_ptr()) for p in store.parameters()]
    owned = [(each.name, each.master.data_ptr(), each.gradient.data_ptr()) for each in store.owned()]
    versions = []

    def note(module, *_):
        versions.append([p._version for p in module.parameters()])

    model.layers[1].register_forward_hook(note)
    model.layers[1].register_full_backward_hook(note)
    for step in range(3):
        loss_of(model, rank, step).backward()
        update(store, optimizer)
    after = [(name, id(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    assert after == before
    assert [(id(p), p.data_ptr()) for p in store.parameters()] == shares
    assert [(e.name, e.master.data_ptr(), e.gradient.data_ptr()) for e in store.owned()] == owned
    for each, parameter in zip(store.owned(), store.parameters(), strict=True):
        assert isinstance(parameter, nn.Parameter) and parameter.is_leaf
        assert parameter.data_ptr() == each.master.data_ptr()
        assert parameter.grad is not None and parameter.grad.data_ptr() == each.gradient.data_ptr()
    assert [each.name for each in store.owned()] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    return versions


@pytest.mark.parametrize("stage", STAGES)
def test_objects_stay_the_same(ranks, stage):
    for versions in ranks(2, run_identity, stage):
        assert all(
            versions[i] == versions[i + 1] for i in range(0, len(versions), 2)
        )  # forward and its backward


def run_read_while_freed():
    model, store, *_ = make()
    x = torch.ones(2, WIDTH)
    said = []
    for read in (
        lambda: model.layers[0].first(x),
        lambda: model.layers[0].first.weight + 1,
        lambda: model.layers[0].first.weight.sum(),
        lambda: model.layers[0].first.weight.tolist(),
        lambda: model.layers[0].first.weight.data.add_(1),
        lambda: model.layers[0].first.weight[0],
        lambda: torch.nn.init.zeros_(model.layers[0].first.weight),
        lambda: torch.stack([model.layers[0].first.weight]),
    ):
        with pytest.raises(RuntimeError) as refused:
            read()
        said.append(str(refused.value))
    assert "7" in repr(model.layers[0].first.weight)
    with store.gathered():
        assert model.layers[0].first.weight.sum().isfinite()
    return said


def test_reading_a_freed_parameter_is_refused(ranks):
    """torch's kernels would read where no memory is."""
    for said in ranks(2, run_read_while_freed):
        assert all("gathered" in sentence for sentence in said)


# ---- several backwards, and none


def run_retained(stage, reshard):
    """Two backwards of one graph, of which the first keeps it."""
    model, store, optimizer, rank = make(stage, **({"reshard": reshard} if stage == 3 else {}))
    for step in range(2):
        loss = loss_of(model, rank, step)
        with store.accumulate():
            loss.backward(retain_graph=True)
        (3 * loss).backward()
        update(store, optimizer)
    return whole_state(store), bytes_of(model.parameters())


@pytest.mark.parametrize(("stage", "reshard"), [(1, True), (2, True), (3, True), (3, False)])
def test_a_graph_may_be_gone_through_twice(ranks, stage, reshard):
    for (state, held), (expected, _) in zip(
        ranks(2, run_retained, stage, reshard), ranks(2, run_retained, 0, True), strict=True
    ):
        assert_same(state, expected)
        assert stage < 3 or held == 0


def run_input_gradient(stage):
    """The gradient of the input by itself, then a backward that ends the step."""
    model, store, optimizer, rank = make(stage)
    x, target = batch(rank, 0, 0)
    loss = nn.functional.mse_loss(model(x.requires_grad_()), target)
    with store.accumulate():
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    update(store, optimizer)
    return gradient, whole_state(store)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_gradient_of_an_input_may_be_asked_for(ranks, stage):
    for (gradient, state), (expected, wanted) in zip(
        ranks(2, run_input_gradient, stage), ranks(2, run_input_gradient, 0), strict=True
    ):
        assert torch.equal(gradient, expected)
        assert_same(state, wanted)


def run_evaluations(stage, reshard):
    """Evaluations before, between and after steps, in the middle of accumulation too, and without eval()."""
    model, store, optimizer, rank = make(stage, **({"reshard": reshard} if stage == 3 else {}))
    x = batch(rank, 9, 9)[0]
    seen = []

    def evaluate(context):
        model.eval()
        with context():
            seen.append(model(x).clone())
        model.train()

    evaluate(torch.no_grad)
    for step in range(2):
        with store.accumulate():
            loss_of(model, rank, step).backward()
        evaluate(torch.inference_mode)
        loss_of(model, rank, step + 5).backward()
        evaluate(torch.no_grad)
        update(store, optimizer)
        evaluate(torch.no_grad)
        model(x)  # with a graph that nobody goes through
        assert (
            stage < 3
            or reshard is False
            or not bytes_of(p for layer in model.layers for p in layer.parameters())
        )
    return seen, whole_state(store)


@pytest.mark.parametrize(("stage", "reshard"), [(2, True), (3, True), (3, False)])
def test_evaluations_between_steps_change_nothing(ranks, stage, reshard):
    for (seen, state), (expected, wanted) in zip(
        ranks(2, run_evaluations, stage, reshard), ranks(2, run_evaluations, 0, True), strict=True
    ):
        assert all(map(torch.equal, seen, expected))
        assert_same(state, wanted)


def run_two_models():
    """Two models with stores of their own, whose steps are made in turn; and each of them alone."""
    wanted = []
    for seed in (1, 2):
        model, store, optimizer, rank = make()
        for step in range(2):
            loss_of(model, rank + seed, step).backward()
            update(store, optimizer)
        wanted.append(whole_state(store))
    both = [make(), make()]
    for step in range(2):
        losses = [loss_of(model, rank + seed, step) for seed, (model, _, _, rank) in enumerate(both, 1)]
        for loss in losses:
            loss.backward()
        for _, store, optimizer, _ in both:
            update(store, optimizer)
    return [whole_state(store) for _, store, _, _ in both], wanted


def test_two_models_do_not_notice_each_other(ranks):
    for found, wanted in ranks(2, run_two_models):
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)


def run_reduce(stage, accumulate, num_steps):
    model, store, optimizer, rank = make(stage, accumulate=accumulate)
    for step in range(num_steps):
        with store.accumulate():
            for microbatch in range(2):
                loss_of(model, rank, 10 * step + microbatch).backward()
        loss_of(model, rank, 10 * step + 2).backward()
        update(store, optimizer)
    return whole_state(store)


def test_microbatches_may_be_reduced_one_by_one(ranks):
    """The sums have another order, which is the same for both stages."""
    local = ranks(2, run_reduce, 0, "local", 2)
    second, third = (ranks(2, run_reduce, stage, "reduce", 2) for stage in (2, 3))
    for wanted, one, other in zip(local, second, third, strict=True):
        assert_same(one, other)
        for name, tensor in wanted.items():
            torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-6)


def run_norms(stage):
    """Norms and gradients where nothing is to be clipped, and where a gradient is not finite."""
    model, store, _, rank = make(stage)
    loss_of(model, rank).backward()
    before = [each.gradient.clone() for each in store.owned()]
    norm = store.clip_grad_norm(1e6)
    assert all(torch.equal(each.gradient, b) for each, b in zip(store.owned(), before, strict=True))
    store.clip_grad_norm(norm.item() / 2)
    half = store.clip_grad_norm(1e6)
    store.zero_grad()
    loss = loss_of(model, rank)
    (loss * float("inf") if rank == 1 else loss).backward()
    return norm.dtype, norm.shape, norm.item(), half.item(), store.clip_grad_norm(1.0).isfinite().item()


@pytest.mark.parametrize("stage", STAGES)
def test_norms(ranks, stage):
    first, second = ranks(2, run_norms, stage)
    assert first == second
    dtype, shape, norm, half, is_finite = first
    assert dtype == torch.float32 and shape == ()
    assert half == pytest.approx(norm / 2, rel=1e-4) and not is_finite
