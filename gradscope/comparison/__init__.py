"""Which initialization, which activation: measured on a model, beside what theory says."""
