"""What learns: the loop and its stages, data, many processes, and their bad days."""
