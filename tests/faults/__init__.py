"""What goes wrong around a worker: processes die, networks fail, servers refuse, clocks jump, rows are odd."""
