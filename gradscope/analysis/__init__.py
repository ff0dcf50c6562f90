"""Analysis: a run → findings, each with its evidence, causes before consequences."""
