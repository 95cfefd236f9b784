"""A NaN or an infinity ends the run and is located: guard, locate, finite."""
