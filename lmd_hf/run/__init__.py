"""How many matrices get done: what to do, and doing it."""
