"""FRAMES -> NUMBERS. Pure functions of clips."""
