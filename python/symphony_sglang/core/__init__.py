"""What decides: pure, synchronous code; time, chance and I/O come in as arguments."""
