"""What a test shows of a set-up that people train in: collected into docs/support.md."""

from typing import Literal

import pytest

Verdict = Literal["right", "labelled", "refused", "unknown"]


def support(
    area: str,
    setup: str,
    *,
    parameters: Verdict | None = None,
    outputs: Verdict | None = None,
    output_gradients: Verdict | None = None,
    note: str = "",
) -> pytest.MarkDecorator:
    """The test, or the one of its parameters, shows this of the set-up.

    right: equal to an independent reference. labelled: the run says in what respect it is not
    what the optimizer was given, or the whole of it. refused: a clear error says what to do.
    unknown: not recorded, and said. None: not this test's matter; another may show it.
    """
    return pytest.mark.support(
        area,
        setup,
        parameters=parameters,
        outputs=outputs,
        output_gradients=output_gradients,
        note=note,
    )
