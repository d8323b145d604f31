"""The tests, by kind: unit, conformance, simulation, integration, web and tidy."""
