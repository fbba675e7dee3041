"""From torch components and a QuantTable to a bundle for one target; needs the ``quantize`` extra."""
