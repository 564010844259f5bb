"""A training run: when plans are solved and from which sums (``coupling.py``), and the term (``term_engine.py``)."""
