"""What each option of a task does, from enqueue to the end: unique, limits, order, after."""
