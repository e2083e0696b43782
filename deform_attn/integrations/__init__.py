"""What makes other people's models call this package; a module for each framework."""
