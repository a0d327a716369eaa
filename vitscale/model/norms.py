"""Normalisation over the last axis, by the names of ModelConfig.norm_kind."""

from torch import nn

from vitscale.model.config import ModelConfig


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """LayerNorm (Ba et al. 2016), with or without bias, or RMSNorm, which has none (Zhang & Sennrich 2019)."""
    if config.norm_kind == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)
