"""The data gate: what is wrong with rows, how it is told, and a data set cleaned of it."""
