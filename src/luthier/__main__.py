"""``python -m luthier``."""

from luthier.cli.app import main

main()
