"""Which sites may be sparse, and the reason that users read of the others."""
