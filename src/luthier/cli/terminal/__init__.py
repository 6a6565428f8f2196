"""Commands from signatures, shared options, console output and progress."""
