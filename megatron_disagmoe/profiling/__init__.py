"""Short trials of plans with the real executor on this machine, and what they say about the cost model."""
