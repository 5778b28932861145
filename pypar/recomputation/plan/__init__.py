"""What each block saves, makes again or moves to the host, so that what is kept meets a budget in the least time."""
