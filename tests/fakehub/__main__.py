"""`python tests/fakehub`: the server."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: it is the package

from fakehub.server import main  # noqa: E402

main()
