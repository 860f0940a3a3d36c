"""Adapt masked language models: train an adapter, measure it, ship it, merge it."""

__version__ = "0.1.0"
