"""The backends: each makes of a frozen tape a function that runs it, one file a backend."""
