"""What both devices share: facts of arrays, the order of their axes in memory, and the context that a forward leaves."""
