"""Rotary position embedding: frequencies (default, linear, dynamic, YaRN, Llama 3) and the two ways to pair dimensions.

B batch, T tokens, H heads, R rotated dim, P = R/2 pairs
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minga.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, dim: int, max_positions: int, length: int = 0) -> tuple[Tensor, float]:
    """Returns the frequency of each pair, (P,) float32, and the factor on cos and sin.

    `length` is the longest sequence so far; only the dynamic form looks at it.
    """
    exponent_P = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    theta, factor = rope.rope_theta, rope.factor or 1.0
    if rope.rope_type == "dynamic":
        stretch = factor * max(length, max_positions) / max_positions - (factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    frequency_P = 1.0 / theta**exponent_P
    if rope.rope_type == "linear":
        return frequency_P / factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, frequency_P, factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, theta**exponent_P, dim, factor), _yarn_attention_factor(rope, factor)
    return frequency_P, 1.0


def _llama3(rope: RopeConfig, frequency_P: Tensor, factor: float) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, the ones between blended."""
    assert rope.original_max_position_embeddings and rope.low_freq_factor and rope.high_freq_factor
    trained = rope.original_max_position_embeddings
    wavelength_P = 2 * math.pi / frequency_P
    stretched_P = torch.where(wavelength_P > trained / rope.low_freq_factor, frequency_P / factor, frequency_P)
    blend_P = (trained / wavelength_P - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended_P = (1 - blend_P) * stretched_P / factor + blend_P * stretched_P
    short, long = wavelength_P < trained / rope.high_freq_factor, wavelength_P > trained / rope.low_freq_factor
    return torch.where(~short & ~long, blended_P, stretched_P)


def _yarn(rope: RopeConfig, base_P: Tensor, dim: int, factor: float) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): pairs that turn often keep their frequency, slow ones are interpolated."""
    assert rope.original_max_position_embeddings

    def pair_with_turns(turns: float) -> float:
        trained = rope.original_max_position_embeddings or 0
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_with_turns(rope.beta_fast or 32), pair_with_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp_P = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep_P = 1 - ramp_P
    return 1.0 / (factor * base_P) * (1 - keep_P) + 1.0 / base_P * keep_P


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:  # DeepSeek: both equal, so 1.0; the m^2 goes to the softmax scale instead
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class Rope:
    """Cosines and sines for positions; no parameters, so nothing of it is in a checkpoint."""

    def __init__(self, config: ModelConfig):
        self._args = (config.rope, config.rope_dim, config.max_position_embeddings)
        self._frequency_P, self._factor = inverse_frequencies(*self._args)
        self._dynamic = config.rope.rope_type == "dynamic"
        self._float32_only = config.rope_style == "complex"

    def __call__(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cos and sin, each (B, T, P)."""
        frequency_P = self._frequency_P
        if self._dynamic:
            frequency_P, _ = inverse_frequencies(*self._args, length=int(positions_BT.max()) + 1)
        if frequency_P.device != positions_BT.device:
            frequency_P = self._frequency_P = frequency_P.to(positions_BT.device)
        angle_BTP = positions_BT[..., None].float() * frequency_P
        if self._float32_only:
            turn_BTP = torch.polar(torch.ones_like(angle_BTP), angle_BTP) * self._factor
            return turn_BTP.real, turn_BTP.imag
        return (angle_BTP.cos() * self._factor).to(dtype), (angle_BTP.sin() * self._factor).to(dtype)


def rotate(x_BTHR: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, style: str) -> Tensor:
    """Turns each pair by its angle. Pairs are neighbours (`interleaved`, `complex`) or the two halves of R (`halves`).

    The result lies as [first of each pair | second of each pair] in every style: queries and keys are permuted alike, so
    scores do not change, and no copy is spent on restoring the order. `complex` is `interleaved` done in float32 complex
    numbers: V2's own code and transformers do so, and only the same multiplication keeps float64 models equal to 1e-9.
    """
    cos, sin = cos_BTP[:, :, None], sin_BTP[:, :, None]
    if style == "complex":
        turned = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
        return torch.cat([turned.real, turned.imag], -1).to(x_BTHR.dtype)
    first, second = x_BTHR.chunk(2, -1) if style == "halves" else (x_BTHR[..., 0::2], x_BTHR[..., 1::2])
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
