"""Device memory as torch counts it: measuring programs of every kind, fitting what no formula knows, and comparing."""
