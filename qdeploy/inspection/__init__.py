"""What a model, calibration set, table or bundle holds, as rows of text, and how an engine runs it."""
