"""The Transformer, readable on one device. `transformer.Transformer` builds any family from its `ModelConfig`."""
