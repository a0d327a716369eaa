"""Weights in and out: native safetensors."""
