"""What a release is assumed to be, and a user's folder compared with it, area by area."""
