"""What only a GPU can show, in parts with time limits; on a machine without one, small and on the CPU."""
