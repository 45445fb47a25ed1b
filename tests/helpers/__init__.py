"""What tests share: the machine's pace, worker processes, a TCP proxy, sessions stepped by hand, short statements."""
