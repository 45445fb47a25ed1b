"""What notifyq costs and how fast it is: `python -m benchmarks [NAME...] [--dsn DSN]`. README.md explains each."""
