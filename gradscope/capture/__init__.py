"""Capture: a model in training → sufficient statistics of its tensors, without changing a bit."""
