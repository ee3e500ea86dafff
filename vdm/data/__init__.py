"""FILE -> CLIP: from videos on disk, or from the procedural mini-something set, to batches of clips."""
