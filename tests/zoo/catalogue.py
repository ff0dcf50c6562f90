"""All cases, by name."""

from tests.zoo.case import Faulty, Healthy

ALL: tuple[Faulty | Healthy, ...] = ()

FAULTY = {case.name: case for case in ALL if isinstance(case, Faulty)}
HEALTHY = {case.name: case for case in ALL if isinstance(case, Healthy)}
