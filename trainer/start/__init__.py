"""How a run starts from another model: its heads, units, and what of it is trained."""
