"""Formation: one cloud without a centre, run by the machines of the people who use it."""

__version__ = "0.1.0"
