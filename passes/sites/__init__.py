"""The neutral records: an attention as it was found, and what became of it."""
