"""From what a user passes to a plan: one look at each array, every check, and the plan that calls which are alike share."""
