"""The version of this project, where every other module can reach it."""

__version__ = "0.1.0"
