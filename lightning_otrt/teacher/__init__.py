"""From whatever users call a teacher to a frozen network that can be run."""
