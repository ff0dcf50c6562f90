"""The models whose parameters can't be given new values here, each with the way out."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gradscope.capture.names import named_modules
from gradscope.capture.shards import placement
from gradscope.errors import ConfigError

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes.")


def refuse(model: nn.Module) -> None:
    """Raise ConfigError for a model that is wrapped, sharded, lazy, meta or quantized."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel) or kind == "FullyShardedDataParallel":
            message = (
                f"model: it is wrapped in {kind}; give the module inside, before it is wrapped"
            )
            raise ConfigError(message)
        if type(module).__module__.startswith(_QUANTIZED):
            message = f"model: {name or kind} is quantized ({kind}); give the model before that"
            raise ConfigError(message)
    for prefix, owner in named_modules(model):
        for part, parameter in owner._parameters.items():  # noqa: SLF001
            why = None if parameter is None else _why_not(parameter)
            if why is not None:
                message = (
                    f"model: {prefix}{'.' if prefix else ''}{part} of {type(owner).__name__} {why}"
                )
                raise ConfigError(message)


def _why_not(parameter: nn.Parameter) -> str | None:
    if is_lazy(parameter):
        return "has no shape yet; run the model once on a batch before"
    if placement(parameter) is not None:
        return "is a shard (fully_shard); give the model before that"
    if parameter.is_meta:
        return (
            "is on the meta device and holds no numbers; give it some with "
            "model.to_empty(device='cpu') and its own initialization"
        )
    if not parameter.is_floating_point() and not parameter.is_complex():
        return f"holds {parameter.dtype} numbers (quantized?); give the model in floating point"
    return None
