"""What clients may make a server hold and do: memory, sizes of bodies and images, rates."""
