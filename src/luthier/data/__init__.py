"""Data pipeline from files to token trees."""
