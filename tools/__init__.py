"""What maintainers of the zoo run in a checkout: benchmark, results, shipping, correlation. Not in the wheel."""
