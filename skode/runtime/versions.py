"""The version of this package, for ``skode.__version__`` and stored models."""

VERSION = "0.1.0"
