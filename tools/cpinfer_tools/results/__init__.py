"""What tools leave: results as they finish, who writes them, what a run that continues finds, the summary."""
