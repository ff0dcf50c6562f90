"""Sick and healthy trainings, each with the diagnosis it should get.

A program is a small training that knows nothing of gradscope: `watch` is given to it, so that
other tools can watch the same training (benchmarks/detection.py).
"""
