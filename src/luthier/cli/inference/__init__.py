"""Commands for queries of models, with shared parts."""
