"""The tests, a package: `tests.simt` and `tests.runners` are imported by name."""
