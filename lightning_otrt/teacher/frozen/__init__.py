"""A teacher in evaluation mode, without gradient, and its inputs."""
