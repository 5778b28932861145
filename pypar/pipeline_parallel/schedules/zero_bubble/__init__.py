"""Schedules whose backwards are in two parts, so that weight gradients fill what would be idle time."""
