"""Benchmarks against a floor in C and against oslo.privsep; docs/benchmarks.md explains them."""
