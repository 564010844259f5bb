"""Loading a teacher, and running it frozen on the inputs of the student."""
