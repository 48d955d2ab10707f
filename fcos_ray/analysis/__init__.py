"""What a job wrote: open it and ask it. Never runs the model."""
