"""Unfool: adversarial examples, generative defences, and how to judge them."""

__version__ = "0.1.0"
