"""`python -m tpcompress`: the `tpcompress` command."""

import sys

from tpcompress.cli.main import main

sys.exit(main())
