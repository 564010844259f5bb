"""The root of a student, whose inputs the teacher gets too, and how much of the student the term reaches."""
