"""What goes wrong elsewhere, one test each."""
