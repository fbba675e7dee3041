"""Reports: the HTML page, charts, tables, the environment of a measurement, and fidelity to a reference. No torch."""
