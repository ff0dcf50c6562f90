"""The log: a run as TensorBoard event files, written while training goes on."""
