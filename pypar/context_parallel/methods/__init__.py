"""How attention gets at the keys and values of other ranks: a file a method, and what they share."""
