"""WEIGHTS IN AND OUT: the same model in our layout, in a diffusers folder, and in the original's files."""
