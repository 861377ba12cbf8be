"""`python -m cpinfer_tools`: the command `cpinfer`, for launchers that start modules."""

import sys

from cpinfer_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
