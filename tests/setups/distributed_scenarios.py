"""Trainings whose every number is known from one process: what `test_distributed.py` compares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gradscope.capture.scope import watch
from tests.capture.reference import Numbers, ParameterReference
from tests.setups.compiling import compiled_module
from tests.setups.processes import Place, Scenario
from tests.setups.sharded import (
    STEPS,
    Sharded,
    expected,
    fsdp,
    net,
    piece,
    recorded,
    reductions,
    sgd,
    shard,
    share,
    watched,
)

# The numbers of the steps, and the reductions that gradscope made.
Result = tuple[list[dict[str, Numbers]], list[str]]


def _followed(
    place: Place,
    training: Sharded,
    reference: Callable[[], list[dict[str, Numbers]]] = expected,
    **options: Any,
) -> Result:
    with reductions() as seen:
        recorded(place, training, **options)
    return reference(), seen


def _ddp(place: Place, **options: Any) -> Sharded:
    model = DistributedDataParallel(net().to(place.device), **options)
    return Sharded(model, [sgd(model.parameters())], lambda number: share(place, number))


def ddp(place: Place) -> Result:
    return _followed(place, _ddp(place))


def ddp_bucket_view(place: Place) -> Result:
    return _followed(place, _ddp(place, gradient_as_bucket_view=True))


def ddp_static_graph(place: Place) -> Result:
    return _followed(place, _ddp(place, static_graph=True), optimizer=None)


class _Forgetful(nn.Module):
    """A layer of it is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


def ddp_unused_parameters(place: Place) -> Result:
    torch.manual_seed(3)
    model = DistributedDataParallel(_Forgetful().to(place.device), find_unused_parameters=True)
    training = Sharded(model, [sgd(model.parameters())], lambda number: share(place, number))
    torch.manual_seed(3)
    return _followed(place, training, lambda: expected(_Forgetful()))


def ddp_no_sync(place: Place) -> Result:
    """Two micro-batches, of which the second is reduced."""
    training = _ddp(place)

    def step(number: int) -> torch.Tensor:
        x, y = share(place, number)
        training.model.zero_grad()
        first, second = zip(x.chunk(2), y.chunk(2), strict=True)
        with training.model.no_sync():  # type: ignore[operator]
            (nn.functional.mse_loss(training.model(first[0]), first[1]) / 2).backward()
        loss = nn.functional.mse_loss(training.model(second[0]), second[1]) / 2
        loss.backward()
        training.optimizers[0].step()
        return loss.detach()

    training.step = step  # type: ignore[method-assign, assignment]
    return _followed(place, training)


def ddp_around_a_watched_model(place: Place) -> Result:
    model = net().to(place.device)
    with reductions() as seen, watch(model, log_dir=place.folder, every=1) as scope:
        wrapped = DistributedDataParallel(model)
        training = Sharded(wrapped, [sgd(wrapped.parameters())], lambda n: share(place, n))
        training.train(scope)
    return expected(), seen


def _compiled(place: Place, training: Sharded) -> Result:
    training.model = compiled_module(training.model, backend="aot_eager")
    return _followed(place, training)


def ddp_compiled(place: Place) -> Result:
    """As torch does it: one graph for each bucket of gradients."""
    return _compiled(place, _ddp(place))


def ddp_compiled_whole(place: Place) -> Result:
    with torch._dynamo.config.patch(optimize_ddp=False):
        return _compiled(place, _ddp(place))


def _zero_redundancy(place: Place) -> Sharded:
    # Importing it warns, and whatever warns where tests are collected fails.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(net().to(place.device))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trainable, torch.optim.SGD, lr=0.3, momentum=0.9)
    return Sharded(model, [optimizer], lambda number: share(place, number))


def ddp_zero_redundancy(place: Place) -> Result:
    return _followed(place, _zero_redundancy(place), lambda: _trainable_held(expected()))


def ddp_zero_redundancy_unnamed(place: Place) -> Result:
    training = _zero_redundancy(place)
    return _followed(place, training, lambda: _trainable_held(expected()), optimizer=None)


def fsdp_default(place: Place) -> Result:
    return _followed(place, fsdp(place))


def fsdp_kept_gathered(place: Place) -> Result:
    return _followed(place, fsdp(place, reshard_after_forward=False), optimizer=None)


def fsdp_of_a_watched_model(place: Place) -> Result:
    model = net().to(place.device)
    with reductions() as seen, watch(model, log_dir=place.folder, every=1) as scope:
        shard(model)
        optimizer = sgd(model.parameters())
        Sharded(model, [optimizer], lambda number: share(place, number)).train(scope)
    return expected(), seen


def fsdp_checkpointed(place: Place) -> Result:
    """Wrapped for activation checkpointing, block by block."""
    model = net().to(place.device)
    model.block = checkpoint_wrapper(model.get_submodule("block"))
    training = Sharded(shard(model), [sgd(model.parameters())], lambda number: share(place, number))
    return _followed(place, training)


def fsdp_compiled(place: Place) -> Result:
    return _compiled(place, fsdp(place))


def fsdp_deep(place: Place) -> Result:
    return _followed(place, fsdp(place), level="deep")


def fsdp_accumulating(place: Place) -> Result:
    """Two micro-batches, of which the first is kept by each process for itself."""
    training = fsdp(place)
    model: Any = training.model

    def step(number: int) -> torch.Tensor:
        x, y = share(place, number)
        model.zero_grad()
        loss = x.new_zeros(())
        for last, (part, target) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            model.set_requires_gradient_sync(bool(last))
            loss = nn.functional.mse_loss(model(part), target) / 2
            loss.backward()
        training.optimizers[0].step()
        return loss.detach()

    training.step = step  # type: ignore[method-assign, assignment]
    return _followed(place, training)


def fsdp_several_optimizers(place: Place) -> Result:
    return _followed(place, _two(place))


def fsdp_several_optimizers_unnamed(place: Place) -> Result:
    return _followed(place, _two(place), optimizer=None)


def _two(place: Place) -> Sharded:
    model = shard(net().to(place.device))
    parameters = list(model.parameters())
    halves = [sgd(parameters[:3]), sgd(parameters[3:])]
    return Sharded(model, halves, lambda number: share(place, number))


def fsdp_optimizer_in_backward(place: Place) -> Result:
    model = shard(net().to(place.device))
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer = sgd([parameter])

            def step(parameter: nn.Parameter, optimizer: torch.optim.SGD = optimizer) -> None:
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(step)
    training = Sharded(model, [], lambda number: share(place, number))
    return _followed(place, training, lambda: _trainable_held(expected()), optimizer=None)


def _trainable_held(steps: list[dict[str, Numbers]]) -> list[dict[str, Numbers]]:
    """The frozen parameter is in no optimizer."""
    for numbers in steps:
        numbers["block.0.bias"]["in_optimizer"] = 0.0
    return steps


def fsdp_hand_written(place: Place) -> Result:
    """No optimizer: the update is written into the loop."""
    model = shard(net().to(place.device))
    velocity = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    data = Sharded(model, [], lambda number: share(place, number))
    with reductions() as seen, watched(place, data, optimizer=None) as scope:
        for number in range(STEPS + 1):

            def update() -> None:
                scope.step()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if parameter.grad is not None:
                            velocity[name].mul_(0.9).add_(parameter.grad)
                            parameter.sub_(velocity[name], alpha=0.3)

            scope.log(loss=data.step(number, update))
    return _trainable_held(expected()), seen


def fsdp_clipped(place: Place) -> Result:
    """The weights and the norm are torch's, bit for bit."""
    bare, training = fsdp(place), fsdp(place)
    with reductions() as seen, watched(place, training) as scope:
        for number in range(STEPS):
            norms: list[Any] = []

            def clip_bare(norms: list[Any] = norms) -> None:
                norms.append(nn.utils.clip_grad_norm_(bare.model.parameters(), 0.1))

            def clip(norms: list[Any] = norms) -> None:
                norms.append(scope.clip_grad_norm_(0.1))

            bare.step(number, clip_bare)
            training.step(number, clip)
            assert norms[0].placements == norms[1].placements
            assert torch.equal(norms[0].to_local(), norms[1].to_local())
            scope.log(loss=1.0, grad_norm=norms[0])
    for mine, other in zip(training.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(mine.to_local(), other.to_local())  # type: ignore[attr-defined]
    return expected(clip=0.1), seen


def fsdp_mixed_precision(place: Place) -> Result:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _followed(
        place, fsdp(place, mp_policy=policy), lambda: _gathered(fsdp(place, mp_policy=policy))
    )


def _gathered(training: Sharded) -> list[dict[str, Numbers]]:
    """The numbers of a split model, read from parameters and gradients put together."""
    whole = net()
    reference = ParameterReference(whole)
    parts = dict(training.model.named_parameters())

    def copy() -> None:
        for name, parameter in whole.named_parameters():
            part: Any = parts[name]
            parameter.data = part.full_tensor().detach().cpu().clone()
            parameter.grad = None if part.grad is None else part.grad.full_tensor().cpu().clone()

    for number in range(STEPS):

        def before() -> None:
            copy()
            reference.before_update()

        training.step(number, before)
        copy()
        reference.after_update()
    return reference.steps


class _Recurrent(nn.Module):
    """What gradscope would run once more, which must not gather weights on one process alone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(2, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.memory(x.unflatten(1, (3, 2)))[0][:, -1])
        return out


def fsdp_recurrent(place: Place) -> Result:
    torch.manual_seed(7)
    model = _Recurrent().to(place.device)
    fully_shard(model)
    training = Sharded(model, [sgd(model.parameters())], lambda number: share(place, number))
    torch.manual_seed(7)
    return _followed(place, training, lambda: expected(_Recurrent()))


def fsdp_large(place: Place) -> list[dict[str, Numbers]]:
    """Shards above the size of which updates are measured on a sample."""

    def build() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 700), nn.Linear(700, 400), nn.Linear(400, 3))

    model = build().to(place.device)
    fully_shard(model)
    training = Sharded(model, [sgd(model.parameters())], lambda number: share(place, number))
    recorded(place, training)
    return expected(build())


def _mesh(place: Place, *shape: int, names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh(place.device, shape, mesh_dim_names=names)


def fsdp_replicated(place: Place) -> Result:
    """HSDP: shards within pairs, replicas between them."""
    mesh = _mesh(place, 2, 2, names=("replicate", "shard"))
    return _followed(place, fsdp(place, mesh=mesh))


def _tensor_parallel(place: Place, mesh: DeviceMesh) -> nn.Module:
    plan: Any = {"first": ColwiseParallel(), "block.0": RowwiseParallel()}
    return parallelize_module(net(8).to(place.device), mesh, plan)


def tensor_parallel(place: Place) -> Result:
    """All processes are given the same batch."""
    model = _tensor_parallel(place, _mesh(place, place.size, names=("tensor",)))
    training = Sharded(model, [sgd(model.parameters())], lambda n: piece(place, n, 0, 1))
    return _followed(place, training, lambda: expected(net(8)))


def sequence_parallel(place: Place) -> list[dict[str, Numbers]]:
    """Each process has a part of the sequence: a norm's gradients are still to be summed."""
    gathered = PrepareModuleInput(
        input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),), use_local_output=True
    )
    plan: Any = {
        "first": ColwiseParallel(),
        "block.0": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "last": gathered,
    }
    model = net(8).to(place.device)
    parallelize_module(model, _mesh(place, place.size, names=("tensor",)), plan)
    training = Sharded(model, [sgd(model.parameters())], lambda n: piece(place, n, 0, 1))
    recorded(place, training)
    return expected(net(8))


def fsdp_tensor_parallel(place: Place) -> Result:
    mesh = _mesh(place, 2, 2, names=("data", "tensor"))
    model = shard(_tensor_parallel(place, mesh["tensor"]), mesh=mesh["data"])
    index = mesh["data"].get_local_rank()
    training = Sharded(model, [sgd(model.parameters())], lambda n: piece(place, n, index, 2))
    return _followed(place, training, lambda: expected(net(8)))


# By name; as docs/support.md calls them.
DDP: dict[str, str] = {
    "ddp": "DDP",
    "ddp_bucket_view": "DDP, `gradient_as_bucket_view`",
    "ddp_static_graph": "DDP, `static_graph`",
    "ddp_unused_parameters": "DDP, `find_unused_parameters`",
    "ddp_no_sync": "DDP, `no_sync`",
    "ddp_around_a_watched_model": "DDP around a watched model",
    "ddp_compiled_whole": "DDP, compiled with `torch._dynamo.config.optimize_ddp=False`",
    "ddp_zero_redundancy": "DDP, `ZeroRedundancyOptimizer`",
    "ddp_zero_redundancy_unnamed": "DDP, `ZeroRedundancyOptimizer`",
}
SPLIT: dict[str, str] = {
    "fsdp_default": "`fully_shard`",
    "fsdp_kept_gathered": "`fully_shard`, `reshard_after_forward=False`",
    "fsdp_of_a_watched_model": "`fully_shard` of a watched model",
    "fsdp_checkpointed": "`fully_shard`, activation checkpointing",
    "fsdp_compiled": "`fully_shard`, compiled",
    "fsdp_accumulating": "`fully_shard`, `set_requires_gradient_sync`",
    "fsdp_several_optimizers": "`fully_shard`, several optimizers",
    "fsdp_several_optimizers_unnamed": "`fully_shard`, several optimizers",
    "fsdp_optimizer_in_backward": "`fully_shard`, an optimizer per parameter, in backward",
    "fsdp_hand_written": "`fully_shard`, updates written by hand",
    "fsdp_clipped": "`fully_shard`, clipping",
    "fsdp_mixed_precision": "`fully_shard`, bf16 policy",
    "fsdp_recurrent": "`fully_shard`, recurrent layers",
    "tensor_parallel": "tensor parallel",
}
FOUR: dict[str, str] = {
    "fsdp_replicated": "HSDP: `fully_shard` with a mesh of replicas × shards",
    "fsdp_tensor_parallel": "`fully_shard` and tensor parallel",
}


def scenarios(size: int) -> dict[str, Scenario]:
    """Those that this number of processes can go through."""
    chosen = [
        *DDP,
        *SPLIT,
        "ddp_compiled",
        "fsdp_deep",
        "fsdp_large",
        "sequence_parallel",
        *(FOUR if size == 4 else []),
    ]
    return {name: globals()[name] for name in chosen}
