"""Parts of benchmarks/buffer.py."""
