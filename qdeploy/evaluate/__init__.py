"""How good a bundle's pictures are, as a set beside reference pictures and one by one beside a float twin."""
