"""Hooks that record neurons, masks and logits in the forwards of student and teacher."""
