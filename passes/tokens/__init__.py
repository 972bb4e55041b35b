"""Tokens of an attention: where they come from, which stay exact, in which order they go."""
