"""The project itself: docs, imports, the wheel, the benchmarks."""
