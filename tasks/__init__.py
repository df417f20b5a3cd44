"""One job per module, nothing else. A new job is a new file here and a line in `schedules/`."""
