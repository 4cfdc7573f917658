"""From what a user passes to a plan: one look at each array, every check, and one plan for all calls that are alike."""
