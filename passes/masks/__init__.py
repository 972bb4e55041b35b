"""Masks: which of them only remove keys, proven without a look at their values."""
