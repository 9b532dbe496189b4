"""What is installed here, which features it enables, what is wrong and the line that mends it."""
