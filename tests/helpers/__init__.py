"""What tests share: apps, databases, worker processes, a TCP proxy, sessions stepped by hand, short statements."""
