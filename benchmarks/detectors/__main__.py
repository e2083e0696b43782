"""``python -m benchmarks.detectors``."""

from benchmarks.detectors.study import main

main()
