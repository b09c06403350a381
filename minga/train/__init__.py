"""The parts of training: optimizers, schedule, losses, balance, one step. The loop that joins them is a recipe."""
