"""Seodang: soft labels in, proven and released students out."""

__version__ = "0.1.0"
