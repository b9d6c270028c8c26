"""`python -m tpcompress.harness.vlmevalkit`."""

import sys

from tpcompress.harness.vlmevalkit.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
