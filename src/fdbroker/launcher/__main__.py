"""`python -I -m fdbroker.launcher` is fdbrokerd under its other name."""

import sys

from fdbroker.launcher.command import main

if __name__ == "__main__":
    sys.exit(main())
