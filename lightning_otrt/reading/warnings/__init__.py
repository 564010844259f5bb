"""Warnings of the first step: student and teacher see or hold different things."""
