"""What everything else stands on: errors, files, progress, the processor, arithmetic, lists and pictures. No torch."""
