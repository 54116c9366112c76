"""Distributed pre-training of VMamba image backbones."""

__version__ = "0.1.0"
