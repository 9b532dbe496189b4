"""The policy as its own critic: rubrics, pairwise tournaments, and the loop that trains it."""
