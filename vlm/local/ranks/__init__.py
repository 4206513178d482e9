"""One engine over several processes, each on a device of its own."""
