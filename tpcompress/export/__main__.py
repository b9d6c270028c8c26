"""`python -m tpcompress.export FOLDER`: verifies a folder in a process of its own."""

import sys

from tpcompress.export.verifier import main

sys.exit(main(sys.argv[1:]))
