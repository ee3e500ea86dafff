"""SAMPLES AND CLIPS -> RECORDS. What `vdm evaluate` is made of; the numbers themselves are those of `vdm.metrics`."""
