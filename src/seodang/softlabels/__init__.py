"""Soft labels: estimators, record codec, and the store that holds them."""

from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore, open

__all__ = ["SoftLabelSequence", "SoftLabelStore", "open"]
