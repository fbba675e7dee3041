"""The stages of quantizing a component, one file and one frozen type each, in this order.

``Prepared`` (which layers) -> ``Observed`` (their ranges) -> ``Rounded`` (their codes) -> ``Reconstructed`` (their
codes, learned). A stage calls arithmetic in ``ranges``, ``rounding`` and ``allocate``, which calls no stage.
"""
