"""Putting the op where a site was, and what graphs need beside it."""
