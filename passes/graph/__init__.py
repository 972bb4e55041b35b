"""The language of graphs: which operation a node is, fake values, axes, memory, new nodes."""
