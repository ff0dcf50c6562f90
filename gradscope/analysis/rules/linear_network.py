"""GS304 linear-network."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.flow import flow
from gradscope.analysis.harm import progress
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words, listed
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a network counts as linear by mistake."""

    # One layer is a linear model on purpose; two can compute no more than one (NeuraLint's rule
    # f009, UMLAUT: linear activations between layers).
    layers: int = 2


_LAYERS = frozenset({"linear", "convolution"})
# They bend the way also where no gradient goes through them, in a part that is frozen.
_BENDS = frozenset({"activation", "attention", "recurrent"})


@rule("GS304", name="linear-network", limits=Limits())
def linear_network(run: Run, limits: Limits) -> Iterator[Finding]:
    """Layers follow one another with nothing non-linear between any of them.

    ## What it measures
    The autograd graph of the first recorded step, from the model's output back to its input: the
    matrix products and convolutions with weights that follow one another, and every operation
    between them and before. Only where all of these are known to be linear there is a finding;
    batch norm and dropout count as linear, layer norm, attention, max pooling and whatever is
    unknown do not.

    ## Why it matters
    A chain of linear maps is one linear map. However deep, such a network separates what a single
    layer separates, and the loss rests where that ends, with gradients that look healthy.

    ## How sure it is
    Certain that no non-linearity stands between the layers: read from the autograd graph. That
    one was meant is likely.

    ## Known limits
    A single linear layer, factorized weights in a network that has a non-linearity somewhere
    (LoRA, attention's projections, separable convolutions, bottlenecks) are no finding. A linear
    autoencoder, or a linear network that is studied as such, learns what it can: while the loss
    falls it is information. Compiled and checkpointed models hide their graph, and are not judged.

    ## Example
    `nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 1))` on two circles: half of
    the points stay on the wrong side. Do instead: `nn.ReLU()` behind each layer but the last.

    ## References
    Minsky & Papert 1969; Nikanjam et al. 2021 (NeuraLint, TOSEM), rule f009; Saxe, McClelland &
    Ganguli 2014 (arXiv:1312.6120) on linear networks studied on purpose.
    """
    graph = flow(run)
    if graph.depth < limits.layers:
        return
    between = graph.behind([source for node in graph.layers for source in graph.activations(node)])
    if graph.may_bend(between, len(run.meta.get("dropout") or {})) or graph.multiplies_outputs():
        return
    layers = _layers(run)
    if layers and any(
        e.group in _BENDS and e.depth < layers[-1].depth for e in run.modules.entities
    ):
        return
    loss = progress(run)
    names = [layer_in_words(entity.name) for entity in layers]
    which = f" ({listed(names)})" if names else ""
    behind = f" behind {listed(names[:-1])}" if len(names) > 1 else " between the layers"
    first, last = (int(run.steps[0]), int(run.steps[-1])) if len(run.steps) else (0, 0)
    yield linear_network.finding(
        Severity.ERROR if loss.failed else Severity.INFO,
        layers[0].name if layers else None,
        f"{graph.depth} layers with weights{which} follow one another with nothing non-linear "
        f"between them, and compute together what one could; {loss.words}.",
        evidence=(
            Evidence(
                "layers in a row without a non-linearity",
                None,
                first,
                last,
                float(graph.depth),
                float(limits.layers),
            ),
        ),
        remedies=(
            f"Put an activation, nn.ReLU() or nn.GELU(),{behind}.",
            "If the model is meant to be linear, a single layer computes the same, and one whose "
            "loss rests has learned what a linear map can: give it better features.",
        ),
    )


def _layers(run: Run) -> list[Entity]:
    """The layers with weights, in order of execution."""
    found = [entity for entity in run.modules.entities if entity.group in _LAYERS]
    return sorted(found, key=lambda entity: entity.depth)
