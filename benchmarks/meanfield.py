"""Growth of the gradient norm per layer: mean-field theory against deep nets.

From the root of the repository: `python -m benchmarks.meanfield`. Thirty fully connected nets of
width 1024 and depth 40, five seeds, four samples; a Gaussian cotangent at the last
pre-activation; √χ is the geometric mean over 39 layers, from the mean of logarithms over seeds and
samples. All nets share their noise: the rows are not independent. Where a small deviation of q
grows (GELU and Mish with He), the prediction is the plug-in of what was measured.
"""

import math
import time

import numpy as np
import torch

from gradscope.comparison.activation import Activation, activation_called
from gradscope.comparison.meanfield import log_variance, predict
from tests.comparison.deep import measure, noise

WIDTH, DEPTH, SEEDS = 1024, 40, 5
AIM = 0.01

_LEAKY = Activation("leaky_relu 0.2", lambda x: torch.nn.functional.leaky_relu(x, 0.2), (0.0,))
CONFIGURATIONS: tuple[tuple[str | Activation, float, float], ...] = (
    ("relu", 2, 0),
    ("relu", 1, 0),
    ("relu", 1 / 3, 0),
    (_LEAKY, 2 / 1.04, 0),
    ("tanh", 1, 0),
    ("tanh", 25 / 9, 0),
    ("tanh", 1 / 3, 0),
    ("tanh", 1.76, 0.05),
    ("tanh", 4, 0.05),
    ("tanh", 1, 0.05),
    ("erf", math.pi / 4, 0),
    ("erf", 2, 0.05),
    ("hardtanh", 1, 0),
    ("hardtanh", 25 / 9, 0),
    ("sigmoid", 1, 0),
    ("sigmoid", 16, 0),
    ("softsign", 1, 0),
    ("gelu", 2, 0),
    ("gelu", 1, 0),
    ("gelu", 1 / 3, 0),
    ("silu", 2, 0),
    ("silu", 1, 0),
    ("mish", 2, 0),
    ("elu", 1, 0),
    ("elu", 2, 0),
    ("selu", 1, 0),
    ("selu", 9 / 16, 0),
    ("selu", 2, 0),
    ("softplus", 1, 0),
    ("linear", 1, 0),
)


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    logs = [(np.empty(SEEDS), np.empty(SEEDS)) for _ in CONFIGURATIONS]
    for seed in range(SEEDS):
        draws = noise(WIDTH, DEPTH, seed)
        for (chi, plug_in), (called, weight, bias) in zip(logs, CONFIGURATIONS, strict=True):
            found = measure(activation_called(called), weight, bias, draws)
            chi[seed], plug_in[seed] = found.log_chi.mean(), found.plug_in.mean()
    print(f"width {WIDTH}, depth {DEPTH}, {SEEDS} seeds, torch {torch.__version__}")
    print("activation       σ_w²    σ_b²   theory   measured ± s.e.     error   plug-in    error")
    errors, a_priori = [], []
    for (chi, plug_in), (called, weight, bias) in zip(logs, CONFIGURATIONS, strict=True):
        activation = activation_called(called)
        theory = predict(activation, weight, bias, q0=weight + bias, depth=DEPTH - 1)
        growth = math.exp(theory.log_gain / (DEPTH - 1) / 2)
        measured, plugged = math.exp(chi.mean() / 2), math.exp(plug_in.mean() / 2)
        spread = measured * chi.std(ddof=1) / 2 / SEEDS**0.5
        a_priori.append(measured / growth - 1)
        errors.append(measured / (growth if theory.steady else plugged) - 1)
        bias_of_logs = -log_variance(theory.kurtosis, WIDTH) / 2 / (DEPTH - 1) / 2
        print(
            f"{activation.name:<15}{weight:7.4f} {bias:6.2f} {growth:9.5f}{measured:9.5f} "
            f"± {spread:.5f} {a_priori[-1]:+8.2%} {plugged:9.5f} {measured / plugged - 1:+8.2%}"
            f"{'' if theory.steady else '  plug-in'}  (width: {bias_of_logs:+.2%})"
        )
    worst, typical = max(np.abs(errors)), np.mean(np.abs(errors))
    within = sum(abs(error) < AIM for error in errors)
    print(
        f"{within} of {len(errors)} within {AIM:.0%} of the growth of the norm; mean error "
        f"{typical:.2%}, largest {worst:.2%}; a priori for all: largest "
        f"{max(np.abs(a_priori)):.2%} ({time.perf_counter() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
