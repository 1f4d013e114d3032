"""UAE: captioner and decoder as an auto-encoder, in three stages."""
