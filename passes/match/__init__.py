"""Spellings of attention, a file each, and the parts that hand-written ones are read by."""
