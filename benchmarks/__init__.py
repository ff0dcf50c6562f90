"""Measurements, speed as ratios side by side in one process: `python -m benchmarks.<name>`."""

import importlib

# Before any library: nothing is downloaded, and torchvision imports beside a torch for the CPU.
importlib.import_module("tests.models")
