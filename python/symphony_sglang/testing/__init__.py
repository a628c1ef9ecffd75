"""Shipped fakes: deterministic stand-ins for the disk, for tests of code that uses this package."""
