"""``luthier models``: the models of this machine."""
