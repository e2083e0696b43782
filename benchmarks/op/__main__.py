"""``python -m benchmarks.op``."""

import sys

from benchmarks.op.run import main

sys.exit(main())
