"""All cases, by name."""

from tests.zoo.case import Faulty, Healthy
from tests.zoo.programs import (
    initialization,
    inputs,
    learning_rate,
    numerics,
    optimizer,
    output,
    real_images,
    real_text,
    representation,
    sound_loops,
    sound_nets,
    sound_objectives,
    structure,
)

ALL: tuple[Faulty | Healthy, ...] = (
    *learning_rate.CASES,
    *optimizer.CASES,
    *initialization.CASES,
    *output.CASES,
    *inputs.CASES,
    *structure.CASES,
    *numerics.CASES,
    *representation.CASES,
    *sound_nets.CASES,
    *sound_loops.CASES,
    *sound_objectives.CASES,
    *real_text.CASES,
    *real_images.CASES,
)

FAULTY = {case.name: case for case in ALL if isinstance(case, Faulty)}
HEALTHY = {case.name: case for case in ALL if isinstance(case, Healthy)}
# Ten seconds each, and from other libraries: not for every run of the tests.
SLOW = {case.name for case in (*real_text.CASES, *real_images.CASES)}
