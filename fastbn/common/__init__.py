"""What both devices share: facts of arrays, the order of their axes, the common part of a plan, a forward's context."""
