"""Limits of other tools for those who come from there, as far as they have a counterpart here."""

from collections.abc import Mapping

PRESETS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    # SageMaker Debugger's defaults (AWS's developer guide, "List of Debugger Built-in Rules").
    # What it compares with an absolute size has no counterpart here: VanishingGradient's mean |g|
    # below 1e-7, PoorWeightInitialization's ratio of variances, WeightUpdateRatio's lower 1e-8.
    # AllZero, ExplodingTensor and NaNs are GS003, GS503 and GS501, which have no number for it.
    "sagemaker": {
        # DeadRelu: a layer counts if more than 50 % of its units are inactive.
        "GS301": {"share": 0.5, "nearly_all": 0.5},
        # SaturatedActivation: a layer counts if more than 50 % of its neurons are saturated.
        "GS302": {"share": 0.5, "at_start": 0.5},
        # WeightUpdateRatio: a ratio above 10, whatever comes of it.
        "GS401": {"once": 10.0, "often": 10.0, "replaced": 10.0, "extreme": 10.0},
        # PoorWeightInitialization looks at the first 10 steps.
        "GS104": {"latest_step": 10},
    },
}
