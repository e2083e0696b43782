"""The detectors: parity with recorded reference outputs, and what was not recorded."""
