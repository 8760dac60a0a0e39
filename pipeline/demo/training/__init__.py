"""The recipe that trained the demo checkpoint. Nothing else needs it."""
