"""Running a model with another activation in place of its own, and leaving nothing behind."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.comparison.activation import Activation
from gradscope.comparison.calls import Call, Handler, Place, answering
from gradscope.comparison.mitigation import Mitigation, normalized
from gradscope.comparison.replays import is_discarded, is_replay
from gradscope.comparison.sites import Site, Sites, refuse_compiled

# Told of a site's pre-activation and output, in the graph.
Probe = Callable[[Site, Tensor, Tensor], None]


class Swapped:
    """How often each site was reached, repeats of checkpoints aside."""

    def __init__(self, sites: Sites) -> None:
        self.counts: Counter[str] = Counter({site.key: 0 for site in sites.hidden})

    @property
    def total(self) -> int:
        """All calls."""
        return self.counts.total()

    @property
    def missed(self) -> tuple[str, ...]:
        """The sites that were not reached."""
        return tuple(key for key, number in self.counts.items() if not number)


class _Swaps(Handler):
    """Answers the calls at hidden sites."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        activation: Activation | None,
        mitigation: Mitigation | None,
        probe: Probe | None,
    ) -> None:
        self._model = model
        self._sites = {site.key: site for site in sites.hidden}
        self._left = sites.left
        self._activation = activation
        self._mitigation = mitigation
        self._probe = probe
        # The last output of each site, for the residual connection to the next one.
        self._outputs: dict[str, Tensor] = {}
        self._starts = {site.previous for site in sites.hidden if site.previous is not None}
        self.swapped = Swapped(sites)

    def answer(self, call: Call) -> Tensor:
        site = None if call.place is None else self._site(call.place)
        if site is None:
            return call.apply(call.values)
        if not is_replay():
            self.swapped.counts[site.key] += 1
        values = call.values
        before = values.clone() if site.in_place else values
        before = normalized(self._model, site, before, self._mitigation)
        if self._activation is not None:
            output = self._activation(before)
        else:
            output = call.apply(before.clone() if site.in_place else before)
        output = self._mitigated(site, output)
        if self._probe is not None and not is_discarded():
            self._probe(site, before, output)
        # Whoever ignores what is returned, or uses the input again, finds it there.
        return values.copy_(output) if site.in_place else output

    def _mitigated(self, site: Site, output: Tensor) -> Tensor:
        mitigation = self._mitigation
        if mitigation is None:
            return output
        if mitigation.residual:
            start = self._outputs.get(site.previous) if site.previous is not None else None
            if start is not None and start.shape == output.shape:
                output = output + start
            if site.key in self._starts:
                self._outputs[site.key] = output
        if mitigation.dropout:
            output = F.dropout(output, mitigation.dropout, training=self._model.training)
        return output

    def _site(self, place: Place) -> Site | None:
        """The site of a call; of one more than there were when the sites were found, the last."""
        key = place.key
        while key not in self._sites and key not in self._left and place.number > 0:
            place = Place(place.module, place.spelling, place.number - 1, place.is_call)
            key = place.key
        return self._sites.get(key)

    def forget(self) -> None:
        self._outputs.clear()


@contextlib.contextmanager
def swapping(
    model: nn.Module,
    sites: Sites,
    activation: Activation | None,
    *,
    mitigation: Mitigation | None = None,
    probe: Probe | None = None,
) -> Iterator[Swapped]:
    """Inside, the model uses this activation at its hidden sites; None leaves it its own.

    Forward and backward belong inside: checkpointed parts run again in the backward. What
    `mitigation.prepare` added to the model takes effect here. Nothing is left behind.

    probe: called with the site, what enters the activation (behind a norm that was added) and the
    output, once in each forward; once more in the repeat of a re-entrant checkpoint, whose first
    run has no gradients.
    Raises ConfigError for a compiled model.
    """
    refuse_compiled(model)
    if not sites.hidden:
        yield Swapped(sites)
        return
    swaps = _Swaps(model, sites, activation, mitigation, probe)
    try:
        with answering(model, sites.modules, swaps):
            yield swaps.swapped
    finally:
        swaps.forget()
