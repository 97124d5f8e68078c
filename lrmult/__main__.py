"""``python -m lrmult``: the command line."""

import sys

from lrmult._command_line import main

if __name__ == "__main__":
    sys.exit(main())
