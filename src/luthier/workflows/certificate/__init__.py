"""The certificate of a model, what it looks like in the forms of others, and whether it still
holds."""
