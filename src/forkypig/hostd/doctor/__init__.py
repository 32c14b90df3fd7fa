"""What this computer lacks, and what was left behind on it."""
