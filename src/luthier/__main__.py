"""``python -m luthier``."""

import os
import sys

if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[
        0
    ]  # python -m puts the working directory first; a random.py there would be imported

from luthier.cli.app import main

main()
