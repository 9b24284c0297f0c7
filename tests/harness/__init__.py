"""What the coverage tools, benchmarks and tests share: model sources, output comparison, measuring."""
