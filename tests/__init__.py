"""A package, so that a distribution that installs a package "tests" of its own does not take its place."""
