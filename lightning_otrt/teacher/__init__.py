"""Loading a teacher, running it frozen on the inputs of the student, and keeping its outputs."""
