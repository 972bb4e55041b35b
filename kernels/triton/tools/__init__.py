"""Tools for whoever works on the kernels: nothing here is on the path of a call."""
