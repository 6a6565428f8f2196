"""From files to token trees."""
