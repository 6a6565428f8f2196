"""The Python face: the functions of ``import luthier``, which the command line shows."""
