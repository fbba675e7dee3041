"""Which layers get more bits or stay in float: their sensitivity, and the knapsack over it."""
