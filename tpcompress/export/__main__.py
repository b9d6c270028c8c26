"""`python -m tpcompress.export FOLDER`: verify a folder in a process of its own."""

import sys

from tpcompress.export.verify import main

sys.exit(main(sys.argv[1:]))
