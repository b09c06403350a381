"""What a model, a run and a machine are, as frozen dataclasses. Standard library only: nothing here may import torch."""

from minga.config.model import ModelConfig, RopeConfig
from minga.config.presets import PRESETS
from minga.config.train import TrainConfig

__all__ = ["PRESETS", "ModelConfig", "RopeConfig", "TrainConfig"]
