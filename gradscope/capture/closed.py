"""Where torch.compile traces what gradscope's ops can't be part of: asked while it traces."""

import sys
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from gradscope.capture.context import is_transformed


def why_closed() -> str | None:
    """Where that is, in words; None where a graph can tell of what runs in it.

    None of these questions has a public name in torch: where one can't be asked, the answer is no.
    """
    for is_so, where in _PLACES:
        try:
            if is_so():
                return where
        except (AttributeError, ImportError, KeyError):
            continue
    return None


def _dynamo(module: str) -> Any:
    """A part of the compiler, which is loaded while it traces."""
    return sys.modules[f"torch._dynamo.{module}"]


def _is_split_by_ddp() -> bool:
    # It cuts the graph where its buckets end, and counts what comes out of each part.
    active = DistributedDataParallel._get_active_ddp_module()  # noqa: SLF001
    mode: object = _dynamo("utils").get_optimize_ddp_mode()
    return active is not None and mode == "ddp_optimizer"


def _is_autograd_compiled() -> bool:
    return bool(_dynamo("config").compiled_autograd)


def _is_within_an_operator() -> bool:
    """Whether a part of the model is traced for an operator that takes it as a graph of its own."""
    tracer = _dynamo("symbolic_convert").InstructionTranslator.current_tx().output.current_tracer
    while tracer.parent is not None:
        # A checkpoint repeats its part, and is made for what has effects.
        known = f"{tracer.source_target} {getattr(tracer, 'description', '')}"
        if "checkpoint" not in known:
            return True
        tracer = tracer.parent
    return False


_PLACES: tuple[tuple[Callable[[], bool], str], ...] = (
    (_is_split_by_ddp, "DDP's compiled buckets"),
    (is_transformed, "transforms of torch.func that are compiled"),
    (_is_autograd_compiled, "graphs with a compiled backward (compiled_autograd)"),
    (_is_within_an_operator, "torch.cond, nested compiled regions and the like"),
)
