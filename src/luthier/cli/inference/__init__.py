"""Commands that query models, and what they share."""
