"""Numerics: one specification (`reference`) and the implementations tested against it."""
