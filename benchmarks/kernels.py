"""What the statistics of a tensor in host memory cost, as multiples of reading it once.

From the root of the repository: `python -m benchmarks.kernels`. A read is `torch.sum`. Both take
turns, on one thread, in the processor's time, which other processes do not take part in; a ratio is
the median over the rounds. In training, histograms and update products are of at most 32,768
entries of a parameter, however large it is.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from gradscope.capture import statistics as kernels

SIZES = (100_000, 1_000_000, 10_000_000)
SMALL, MANY = 1_000, 300
ROUNDS = 15


def moments(x: Tensor) -> object:
    return kernels.moments(x)


def squares(x: Tensor) -> object:
    return kernels.squares(x)


def octaves(x: Tensor) -> object:
    return kernels.magnitudes([x])


def products(x: Tensor) -> object:
    return kernels.update_products(x, x, x)


def seconds(action: Callable[[], object], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        action()
    return (time.thread_time() - start) / times


def compared(base: Callable[[], object], other: Callable[[], object], times: int) -> str:
    base(), other()
    rounds = [(seconds(base, times), seconds(other, times)) for _ in range(ROUNDS)]
    ratios = [cost / one for one, cost in rounds]
    unit = statistics.median(one for one, _ in rounds)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{statistics.median(ratios):7.2f}  ({spread}; the unit {1e3 * unit:.3f} ms)"


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            ordinary = torch.randn(size).to(dtype)
            with_nan, far = ordinary.clone(), 1 + 1e-3 * ordinary
            with_nan[size // 2] = torch.nan
            cases = (
                ("moments", moments, ordinary),
                ("moments, with a NaN", moments, with_nan),
                ("moments, mean 1, σ 0.001", moments, far),
                ("squares", squares, ordinary),
                ("histogram", octaves, ordinary),
                ("update products", products, ordinary),
            )
            for name, read, tensor in cases:
                found = compared(tensor.sum, lambda: read(tensor), max(1, 1_000_000 // size))  # noqa: B023
                print(f"{size:10,} {str(dtype)[6:]:9} {name:26} {found}", flush=True)
    images = torch.randn(32, 64, 56, 56).to(memory_format=torch.channels_last)
    found = compared(images.sum, lambda: moments(images), 1)
    print(f"{images.numel():10,} float32   {'moments, channels last':26} {found}")
    small = [torch.randn(SMALL) for _ in range(MANY)]
    found = compared(
        lambda: [kernels.moments(x) for x in small], lambda: kernels.moments_of(small), 3
    )
    print(f"moments of {MANY} tensors of {SMALL:,}: all at once over one by one  {found}")


if __name__ == "__main__":
    main()
