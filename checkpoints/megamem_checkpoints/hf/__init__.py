"""Export of a checkpoint as a Hugging Face model directory that carries its own modelling code."""
