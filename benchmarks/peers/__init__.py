"""notifyq beside the queues people know: see README.md."""
