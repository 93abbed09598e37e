"""The phone's programs, by theme. Each is a coroutine that takes a `Call` and returns an exit code."""
