"""Everything that knows Lightning: callback, wrapper, monitor."""
