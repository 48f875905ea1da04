"""`python -m fdbroker.scan.service`."""

import sys

from fdbroker.scan.service.main import main

if __name__ == "__main__":
    sys.exit(main())
