"""From a recorded target to vectors: where they start, what is minimised, by what, for how long, in which stages."""
