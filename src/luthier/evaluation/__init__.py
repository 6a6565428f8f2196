"""How good a model is, and whether what is stored is what was trained."""
