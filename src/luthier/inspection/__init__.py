"""The data gate: what is wrong with data, row by row, before anything is trained."""
