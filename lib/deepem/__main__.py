"""``python -m deepem`` is ``deepem``."""

import sys

from deepem.cli import main

if __name__ == "__main__":
    sys.exit(main())
