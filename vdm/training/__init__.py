"""CLIPS -> WEIGHTS. The settings, the task (what one step computes) and the loop (how often, and what it writes)."""
