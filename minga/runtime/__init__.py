"""What the program stands on: the machine it finds itself on and what is installed there."""
