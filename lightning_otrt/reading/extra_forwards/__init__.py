"""Forwards besides those of the user, which leave networks, batches and random numbers as they were."""
