"""What a model costs, worked out from its config alone: parameters, bytes, FLOPs. No torch, so it answers at once."""
