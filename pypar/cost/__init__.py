"""How fast machines and their links are, for whatever predicts seconds."""
